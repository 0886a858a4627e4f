"""Ranks of a gloo group against one process: four are started once, and smaller groups of them."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from check import peak_bytes
from formulas import info_nce_formula, info_nce_metrics
from ranks import new_group, order
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastxm.losses import ClipLoss, SigLipLoss, cached_step
from fastxm.ops import backend, info_nce, info_nce_op
from fastxm.ops.siglip import siglip

JOBS = [  # ranks of the group, rows of each, options
    ((0, 1, 2, 3), (3, 0, 5, 1), {"label_smoothing": 0.1, "labels": True, "normalize": True}),
    ((0, 1, 2, 3), (2, 3, 1, 4), {"labels": True}),
    (order(3, 1), (4, 4), {"label_smoothing": 0.1, "symmetric": False}),
    (order(3, 1), (0, 6), {"reduction": "sum", "normalize": True}),
    ((2,), (5,), {"label_smoothing": 0.2, "labels": True}),
]
BACKENDS = ["cpu", "reference"]
ROWS, WIDTH = 8, 4096  # of a rank, where memory is measured


def whole_batch(N):
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, N, 6, generator=generator, dtype=torch.float64)
    return x, y, torch.tensor(1.3, dtype=torch.float64), torch.arange(N) ** 2 % 3


def derivatives(f, x, y, scale, **options):
    """The loss, its gradients, and those of the sum of their squares."""
    leaves = [t.detach().requires_grad_() for t in (x, y, scale)]
    loss = f(*leaves, **options)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in again[:2]), leaves)
    return [t.detach() for t in (loss, *first, *second)]


def own_rows(rank, counts):
    x, y, scale, labels = whole_batch(sum(counts))
    here = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return x[here], y[here], scale, labels[here]


def shares(group, rank, counts, options):
    """What this rank has of a job: by each backend, products kept or made again."""
    x, y, scale, labels = own_rows(rank, counts)
    options = {**options, "group": group, "labels": labels if "labels" in options else None}
    results = []
    for name in BACKENDS:
        for worth in ({}, {"cpu": 0}):
            info_nce_op.WORTH = worth
            with backend(name):
                found = derivatives(info_nce, x, y, scale, **options)
                metrics = info_nce(x, y, scale, return_metrics=True, **options)[1]
                # the mean of no rows is NaN, and counts for nothing
                results.append([*found, torch.stack(metrics).nan_to_num() * counts[rank]])
    return results


def siglip_formula(x, y, scale):
    signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(signs * (scale * x @ y.T - 0.7)).sum() / len(x)


def with_bias(f):
    return lambda x, y, scale, **options: f(x, y, scale, -0.7, **options)


SIGLIP = [((0, 1, 2, 3), (3, 0, 5, 1)), (order(3, 1), (4, 4)), ((2,), (5,))]  # ranks, rows of each
DROP_INS = {  # made with world_size, and the truth
    "clip": (lambda **world: ClipLoss(**world), info_nce_formula),
    "local clip": (lambda **world: ClipLoss(local_loss=True, **world), info_nce_formula),
    "siglip": (lambda **world: with_bias(SigLipLoss(**world)), siglip_formula),
}


UNEQUAL = (2, 3, 1, 5)


def encoder():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def trained(rank):
    """Gradients of an encoder of both sides, on a rank with more chunks than another."""
    x, y, scale, _ = own_rows(rank, UNEQUAL)
    model = DistributedDataParallel(encoder())

    def loss(x, y):
        return info_nce(x, y, scale, group=dist.group.WORLD)

    cached_step([model, model], [x, y], loss, 2)
    return [p.grad for p in model.parameters()]


def memory(group):
    """Bytes of a step, and of one that can be differentiated again, which gathers all rows."""
    x, y = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    leaves = [x.requires_grad_(), y.requires_grad_()]

    def step(**options):
        loss = info_nce(*leaves, 0.01, group=group)
        return torch.autograd.grad(loss, leaves, **options)

    return [peak_bytes(step), peak_bytes(lambda: step(create_graph=True))]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    results = {}
    for job, (members, counts, options) in enumerate(JOBS):
        group = new_group(members)
        if rank in members:
            results[job] = shares(group, members.index(rank), counts, options)
    for job, (members, counts) in enumerate(SIGLIP):
        group = new_group(members)
        if rank in members:
            x, y, scale, _ = own_rows(members.index(rank), counts)
            found = derivatives(with_bias(siglip), x, y, scale, group=group)
            results["siglip", job] = found
    x, y, scale, _ = own_rows(rank, (3, 3, 3, 3))
    for name, (make, _) in DROP_INS.items():
        results[name] = derivatives(make(world_size=4), x, y, scale)
    results["trained"] = trained(rank)
    results["memory"] = memory(dist.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


def compare(parts, truth, share):
    """What the ranks have of `derivatives`, against one process.

    share: of a rank in the loss. DistributedDataParallel averages over ranks the gradients of the
    mean.
    """
    for i, (of_ranks, whole) in enumerate(zip(zip(*parts), truth)):
        ours = torch.cat(of_ranks) if whole.ndim else sum(of_ranks)
        torch.testing.assert_close(ours * (share if i < 4 else share**2), whole)


@pytest.mark.parametrize("job", range(len(JOBS)))
def test_ranks_are_one_batch(ranks, job):
    members, counts, options = JOBS[job]
    x, y, scale, labels = whole_batch(sum(counts))
    options = {**options, "labels": labels if "labels" in options else None}
    truth = derivatives(info_nce_formula, x, y, scale, **options)
    metrics = info_nce_metrics(x, y, scale, **options)
    share = 1 if options.get("reduction") == "sum" else 1 / len(counts)
    for parts in zip(*(ranks[rank][job] for rank in members)):
        compare(parts, truth, share)
        torch.testing.assert_close(sum(part[-1] for part in parts) / len(x), metrics)


@pytest.mark.parametrize("job", range(len(SIGLIP)))
def test_siglip(ranks, job):
    members, counts = SIGLIP[job]
    truth = derivatives(siglip_formula, *whole_batch(sum(counts))[:3])
    compare([ranks[rank]["siglip", job] for rank in members], truth, 1 / len(counts))


@pytest.mark.parametrize("name", DROP_INS)
def test_drop_ins(ranks, name):
    truth = derivatives(DROP_INS[name][1], *whole_batch(12)[:3])
    parts = [rank[name] for rank in ranks]
    if name == "clip":
        # the value is that of the whole batch, as open_clip's is without local_loss
        assert all(torch.allclose(part[0], truth[0]) for part in parts)
    compare(parts, truth, 1 / 4)


def test_cached_step_of_all_ranks(ranks):
    model, (x, y, scale, _) = encoder(), whole_batch(sum(UNEQUAL))
    info_nce_formula(model(x), model(y), scale).backward()
    for rank in ranks:
        torch.testing.assert_close(rank["trained"], [p.grad for p in model.parameters()])


def test_memory_is_that_of_one_rank(ranks):
    # y, its gradient and that of x, each computed, sent and received at once; not four of them all
    for rank in ranks:
        step, gathered = (peak / (ROWS * WIDTH * 8) for peak in rank["memory"])
        assert step < 12 < 20 < gathered
