"""Each variable that is in conflict or costly is found, where it matters, and what is harmless is left alone."""

from pathlib import Path

import pytest
from shoestring.launch.doctor import variables
from shoestring.launch.doctor.variables import Situation

CPU = Situation(cores=8, local_ranks=4, interfaces=("eth0", "lo"), package=Path("/opt/shoestring"))
GPU = Situation(
    gpus=8, rdma=("mlx5_0", "mlx5_1"), interfaces=("eth0", "ib0", "lo"), cores=64, local_ranks=8, nodes=4, device="cuda",
    wandb="online", package=Path("/opt/shoestring"),
)  # fmt: skip


def found(environ: dict, situation: Situation) -> list[tuple[str, str]]:
    lines = list(variables.check(environ, situation))
    assert all(line.kind == "variables" and line.value and (line.state == "ok" or line.advice) for line in lines)
    return [(line.check, line.state) for line in lines if line.state != "ok"]


TOGETHER = {"RANK": "3", "WORLD_SIZE": "32", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "29400"}
WRONG = [
    # environment, on CPU cores, on a node of GPUs: None, "warn" or "fail"
    ({"NCCL_P2P_DISABLE": "1"}, "warn", "warn"),
    ({"NCCL_IB_DISABLE": "1"}, "warn", "fail"),  # this node has RDMA
    ({"CUDA_LAUNCH_BLOCKING": "1"}, "warn", "fail"),
    ({"TRITON_INTERPRET": "1"}, "warn", "fail"),
    ({"NCCL_DEBUG": "TRACE"}, "warn", "warn"),
    ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, "warn", "warn"),
    ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "warn", "warn"),
    ({"NCCL_PROTO": "LL128"}, "warn", "warn"),
    ({"PYTHONOPTIMIZE": "1"}, "warn", "warn"),
    ({"RANK": "0"}, "fail", "fail"),
    ({"WORLD_SIZE": "8"}, "fail", "fail"),
    ({"RANK": "zero", "WORLD_SIZE": "8"}, "fail", "fail"),
    ({"RANK": "0", "WORLD_SIZE": "8"}, "fail", "fail"),  # nobody knows where to meet
    ({**TOGETHER, "RANK": "32"}, "fail", "fail"),
    ({name: value for name, value in TOGETHER.items() if name != "LOCAL_RANK"}, None, "warn"),
    ({"OMP_NUM_THREADS": "3"}, "warn", None),  # 12 threads on 8 cores; 24 on 64
    ({"OMP_NUM_THREADS": "9"}, "warn", "warn"),
    ({"OMP_NUM_THREADS": "many"}, "fail", "fail"),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, None, "fail"),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,-1,5,6,7"}, None, "fail"),  # those after -1 are hidden, too
    ({"CUDA_VISIBLE_DEVICES": ""}, None, "fail"),
    ({"TORCH_NCCL_BLOCKING_WAIT": "1"}, "warn", "warn"),
    ({"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}, "fail", "fail"),
    ({"NCCL_SOCKET_IFNAME": "bond"}, "fail", "fail"),
    ({"NCCL_SOCKET_IFNAME": "^eth,ib,lo"}, "fail", "fail"),
    ({"GLOO_SOCKET_IFNAME": "eth"}, "fail", "fail"),  # gloo takes whole names
    ({"GLOO_SOCKET_IFNAME": "lo"}, None, "fail"),  # four nodes
    ({"NCCL_IB_HCA": "mlx4"}, None, "fail"),
    ({"https_proxy": "http://proxy:3128"}, "warn", "warn"),
    ({"HTTP_PROXY": "http://127.0.0.1:3128", "NO_PROXY": "localhost"}, None, "warn"),  # of other nodes it is not there
    ({"WANDB_MODE": "offline"}, "warn", "warn"),
    ({"DS_ACCELERATOR": "xpu"}, "fail", "fail"),
    ({"PYTHONPATH": "/opt/shoestring"}, "warn", "warn"),
]  # fmt: skip


@pytest.mark.parametrize(("environ", "on_cpu", "on_gpu"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, dict) else str(v))
def test_each_is_found_where_it_matters(environ, on_cpu, on_gpu):
    for situation, state in ((CPU, on_cpu), (GPU, on_gpu)):
        names = found(environ, situation)
        assert [s for _, s in names] == ([state] if state else []), names
        assert all(any(name in check.upper() for name in map(str.upper, environ)) for check, _ in names)


HARMLESS = [
    {},
    TOGETHER,
    {"NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": "0", "CUDA_LAUNCH_BLOCKING": "0"},
    {"NCCL_DEBUG": "WARN", "TORCH_DISTRIBUTED_DEBUG": "OFF"},
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
    {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
    {"NCCL_SOCKET_IFNAME": "eth"},  # NCCL takes beginnings
    {"NCCL_SOCKET_IFNAME": "=eth0"},
    {"NCCL_SOCKET_IFNAME": "^docker,lo"},
    {"NCCL_IB_HCA": "mlx5_0:1"},
    {"NCCL_IB_HCA": "^mlx5_1"},
    {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org, 127.0.0.1"},
    {"PYTHONPATH": "/nowhere"},
]


@pytest.mark.parametrize("environ", HARMLESS, ids=lambda environ: " ".join(environ) or "nothing")
def test_what_is_harmless_is_left_alone(environ):
    assert found(environ, CPU) == [] and found(environ, GPU) == []
    [line] = variables.check(environ, CPU)
    assert line.state == "ok"


def test_one_thread_per_rank_is_no_waste_even_on_few_cores():
    """So does our launcher start them: four ranks on two cores."""
    assert found({"OMP_NUM_THREADS": "1"}, Situation(cores=2, local_ranks=4)) == []


def test_the_mode_of_wandb_that_was_configured_is_no_conflict():
    assert found({"WANDB_MODE": "online"}, GPU) == found({"WANDB_MODE": "disabled"}, CPU) == []
    assert found({"WANDB_DISABLED": "true"}, GPU) == [("WANDB_DISABLED=true", "warn")]


def test_a_path_with_another_shoestring(tmp_path):
    (tmp_path / "shoestring").mkdir()
    (tmp_path / "shoestring" / "__init__.py").touch()
    assert found({"PYTHONPATH": f"/nowhere:{tmp_path}"}, CPU) == [("PYTHONPATH", "fail")]
    assert found({"PYTHONPATH": str(tmp_path)}, Situation(package=tmp_path / "shoestring")) == []
