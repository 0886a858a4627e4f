"""MMD on the ranks of a gloo group against one process: four are started once."""

import pytest
import torch
import torch.distributed as dist
from ranks import new_group, order

from fastxm.ops import backend, mmd2
from fastxm.ops.mmd import RBF, Laplace, Linear, Polynomial

JOBS = [  # ranks of the group, rows of x and of y of each, options
    ((0, 1, 2, 3), (3, 0, 5, 1), (2, 4, 0, 3), {"estimator": "unbiased", "weights": True}),
    ((0, 1, 2, 3), (3, 1, 2, 4), (3, 1, 2, 4), {"estimator": "u_statistic"}),
    (order(3, 1), (4, 2), (1, 6), {"estimator": "biased", "weights": True}),
    ((0, 2, 3), (2, 3, 1), (4, 1, 2), {"estimator": "unbiased"}),
    ((2,), (5,), (4,), {"estimator": "unbiased", "weights": True}),
]
BACKENDS = ["cpu", "reference"]


def whole(n, m):
    generator = torch.Generator().manual_seed(5)
    new = {"generator": generator, "dtype": torch.float64}
    x, y = torch.randn(n, 3, **new) + 4, torch.randn(m, 3, **new) * 1.3 + 4
    return [x, y, torch.rand(n, **new) + 0.5, torch.rand(m, **new) + 0.5]


def derivatives(x, y, a, b, estimator, weights=False, group=None):
    """MMD^2, its gradients, and those of the sum of their squares."""
    p = torch.tensor([0.8, 1.7], dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in (x, y, p, *((a, b) if weights else ()))]
    x, y, p, *rest = leaves
    kernel = RBF(p) + Laplace(p[1]) + Polynomial(2, p[0]) + Linear(p[1])
    given = dict(zip(("x_weight", "y_weight"), rest))
    total = mmd2(x, y, kernel, estimator=estimator, group=group, **given)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in again[:2]), leaves[:2])
    return [t.detach() for t in (total, *first, *second)]


def own(which, counts, rank):
    return which[sum(counts[:rank]) : sum(counts[: rank + 1])]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    results = {}
    for job, (members, *counts, options) in enumerate(JOBS):
        group = new_group(members)
        if rank not in members:
            continue
        place, given = members.index(rank), whole(*map(sum, counts))
        rows = [own(t, c, place) for t, c in zip(given, counts * 2)]
        results[job] = []
        for name in BACKENDS:
            with backend(name):
                results[job].append(derivatives(*rows, **options, group=group))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("job", range(len(JOBS)))
def test_ranks_are_one_process(ranks, job):
    members, *counts, options = JOBS[job]
    total, dx, dy, dp, *weights, ddx, ddy = derivatives(*whole(*map(sum, counts)), **options)
    size, same = len(members), torch.testing.assert_close
    for parts in zip(*(ranks[rank][job] for rank in members)):
        for found in parts:
            # the value and the gradient of the kernel's numbers are whole on every rank
            same(found[0], total)
            same(found[3], dp)
        joined = [torch.cat(each) for each in zip(*(part[1:3] + part[4:] for part in parts))]
        # each rank's result depends on all rows: the sum over ranks is so many times the one
        for ours, truth in zip(joined[:-2], (dx, dy, *weights)):
            same(ours / size, truth)
        for ours, truth in zip(joined[-2:], (ddx, ddy)):
            same(ours / size**2, truth)


def test_what_a_group_does_not_take(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        x, group = torch.randn(4, 3), dist.group.WORLD
        for options in ({"estimator": "block"}, {"estimator": "linear"}):
            with pytest.raises(ValueError, match="group"):
                mmd2(x, x, group=group, **options)
        with pytest.raises(ValueError, match="group"):
            mmd2(x[None], x[None], group=group)
        with pytest.raises(ValueError, match="together"):
            mmd2(x[:1], x, estimator="unbiased", group=group)
    finally:
        dist.destroy_process_group()
