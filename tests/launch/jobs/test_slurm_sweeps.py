"""Under a real Slurm of three nodes on this machine: four runs as an array."""

from shoestring.launch import exit_codes
from shoestring.train.metrics import read_records

from .launched import SMALL, Launched


def test_a_sweep_is_an_array(slurm, tmp_path):
    words = [*SMALL, "name=sweep", "train.steps=4", "optim.lr=1e-3,2e-3", "train.seed=1,2"]
    with Launched(slurm, tmp_path, words, "--multirun") as launched:
        code, text = launched.end()
        assert code == exit_codes.OK, text
        ended = sorted((tmp_path / "runs/sweep").glob("*/metrics.jsonl"))
        assert [path.parent.name[:1] for path in ended] == ["0", "1", "2", "3"]
        assert len({tuple(record.loss for record in read_records(path)) for path in ended}) == 4  # four different runs
        assert all(len(read_records(path)) == 4 for path in ended)
    again = Launched(slurm, tmp_path, words, "--multirun")
    assert again.end(60) == (exit_codes.OK, "all of its runs are complete\n")
