"""Under a real Slurm of three nodes on this machine: a run that takes longer than its job may."""

import json

from shoestring.launch import exit_codes
from shoestring.train.metrics import read_records

from .launched import SMALL, Launched


def test_a_run_longer_than_its_limit_is_a_chain(slurm, tmp_path):
    """Slurm looks at limits every half minute, so a link of two minutes is told to save after 30 to 60 seconds."""
    run = tmp_path / "runs/long"
    words = [*SMALL, "parallel.ep=2", "name=long", "train.steps=700", "launch.slurm.time=0:02:00", "launch.slurm.signal_s=60"]
    with Launched(slurm, tmp_path, words) as launched:
        job = launched.until(lambda: json.loads(sent.read_text())["id"] if (sent := run / "slurm/sent.json").exists() else None)
        launched.hurrying(job)
        code, text = launched.end()
    assert code == exit_codes.OK, text
    links = [json.loads(line) for line in (run / "slurm/links.jsonl").read_text().splitlines()]
    assert len(links) > 1 and links[-1]["then"] == "done"
    assert {(link["code"], link["then"]) for link in links[:-1]} <= {(75, "again"), (143, "again")}  # told before its ranks were up
    assert any(link["code"] == exit_codes.PREEMPTED for link in links)
    assert [record.step for record in read_records(run / "metrics.jsonl")] == list(range(1, 701))  # each once: nothing was lost
