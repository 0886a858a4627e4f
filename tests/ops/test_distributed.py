import torch
import torch.distributed as dist
from test_info_nce import formula

from fastxm.ops import info_nce

JOBS = [  # rows of each rank, options
    ((4, 4), {"label_smoothing": 0.1, "labels": True, "normalize": True}),
    ((2, 5), {"label_smoothing": 0.1, "labels": True, "normalize": True}),
    ((5, 0), {"symmetric": False, "reduction": "sum"}),
]


def whole_batch(N):
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, N, 6, generator=generator, dtype=torch.float64)
    return x, y, torch.tensor(1.3, dtype=torch.float64), torch.arange(N) ** 2 % 3


def derivatives(loss_of, x, y, scale, **options):
    """The loss, its gradients, and those of the sum of their squares."""
    leaves = [t.detach().requires_grad_() for t in (x, y, scale)]
    loss = loss_of(*leaves, **options)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first[:2]), leaves)
    return [t.detach() for t in (loss, *first, *second)]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = []
    for counts, options in JOBS:
        x, y, scale, labels = whole_batch(sum(counts))
        here = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        options = {**options, "labels": labels[here] if options.get("labels") else None}
        options["group"] = dist.group.WORLD
        results.append(derivatives(info_nce, x[here], y[here], scale, **options))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for (counts, options), first, second in zip(JOBS, *ranks):
        x, y, scale, labels = whole_batch(sum(counts))
        options = {**options, "labels": labels if options.get("labels") else None}
        truth = derivatives(formula, x, y, scale, **options)
        # DistributedDataParallel averages over ranks the gradients of the mean
        share = 1 if options.get("reduction") == "sum" else 1 / len(counts)
        for i, (a, b) in enumerate(zip(first, second)):
            ours = torch.cat([a, b]) if a.ndim else a + b
            torch.testing.assert_close(ours * (share if i < 4 else share**2), truth[i])
