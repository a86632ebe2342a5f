"""One sequence over several processes: the same result, a part of the memory and time.

    torchrun --nproc-per-node 2 examples/parallel.py                       # on a CPU, or two GPUs
    torchrun --nproc-per-node 4 examples/parallel.py --ulysses 2 --ring 2

Needs torch alone. Each process has its own part of the tokens, as under a plan of diffusers; the
whole sequence is made here only to compare.
"""

from __future__ import annotations

import argparse
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import attnproc

HEADS, DIM = 8, 64


def main() -> None:
    """Compares attention over all processes with that of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--ulysses", type=int, default=0, help="0: all processes that are left")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    # A process that ends or hangs is an error on the others after this time.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=60))
    device = f"cuda:{dist.get_node_local_rank()}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)

    ulysses = options.ulysses or dist.get_world_size() // options.ring
    shape, names = (options.ring, ulysses), ("ring", "ulysses")
    mesh = init_device_mesh(device.partition(":")[0], shape, mesh_dim_names=names)

    torch.manual_seed(0)
    attn = attnproc.Attention(
        query_dim=HEADS * DIM,
        heads=HEADS,
        dim_head=DIM,
        processor=attnproc.AttnProcessor2_0(),
    ).to(device)
    x = torch.randn(1, options.tokens, HEADS * DIM, device=device)
    with torch.inference_mode():
        want = attn(x)
        attnproc.parallelize(attn, mesh, inside=False, text="split")
        own = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
        attn(own)
        start = time.perf_counter()
        got = attn(own)
    took = time.perf_counter() - start

    error = (got - want.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]).abs().max().item()
    if dist.get_rank() == 0:
        print(f"{own.shape[1]} of {options.tokens} tokens a process, mesh {names} = {shape}")
        print(f"off by {error:.1e} from one process; {took * 1e3:.1f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
