"""Modulation and region-word loss on the ranks of a gloo group against one process."""

import pytest
import torch
import torch.distributed as dist
from formulas import modulation_formula
from ranks import new_group, order

from fastxm.losses import region_word_loss
from fastxm.ops import backend, modulation

JOBS = [((0, 1), (3, 1)), (order(1, 0), (2, 2)), ((1,), (4,))]  # ranks, rows of each
COMPILED = 0
BACKENDS = ["cpu", "reference"]


def maps(rows):
    generator = torch.Generator().manual_seed(5)
    new = {"generator": generator, "dtype": torch.float64}
    x = (torch.randn(rows, 5, 4, 6, **new) * 2 + 3).to(memory_format=torch.channels_last)
    return x, *torch.randn(2, rows, 5, 2, 3, **new) / 2, torch.randn(x.shape, **new)


def features(rows):
    generator = torch.Generator().manual_seed(6)
    new = {"generator": generator, "dtype": torch.float64}
    lengths = torch.arange(rows) % 4 + 1
    return torch.randn(rows, 6, 3, **new), torch.randn(rows, 4, 3, **new), lengths


def derivatives(loss, leaves):
    """A loss, its gradients, and those of the sum of their squares."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    again = torch.autograd.grad(value, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves)
    return [t.detach() for t in (value, *first, *second)]


def of_modulation(f, x, gamma, beta, weight, **options):
    def loss(*leaves):
        return (f(*leaves, **options) * weight).sum()

    return derivatives(loss, (x, gamma, beta))


def of_words(regions, words, lengths, group=None):
    def loss(regions, words):
        return region_word_loss(regions, words, lengths, score_scale=3.0, group=group)

    return derivatives(loss, (regions, words))


def moved(x, gamma, beta, group=None):
    running = {"running_mean": x.new_zeros(5), "running_var": x.new_ones(5)}
    modulation(x, gamma, beta, group=group, **running)
    return torch.stack(list(running.values()))


def compiled(x, gamma, beta, weight, group):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, gamma, beta):
        return modulation(x, gamma, beta, group=group)

    leaves = [t.detach().requires_grad_() for t in (x, gamma, beta)]
    return torch.autograd.grad((step(*leaves) * weight).sum(), leaves)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    for job, (members, counts) in enumerate(JOBS):
        group = new_group(members)
        if rank not in members:
            continue
        place = members.index(rank)
        own = slice(sum(counts[:place]), sum(counts[: place + 1]))
        given = [t[own] for t in maps(sum(counts))]
        rows = [t[own] for t in features(sum(counts))]
        for name in BACKENDS:
            with backend(name):
                found = of_modulation(modulation, *given, group=group)
                results[job, name] = [*found, *of_words(*rows, group=group)]
        results[job] = moved(*given[:3], group=group)
        if job == COMPILED:
            results["compiled"] = compiled(*given, group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("job", range(len(JOBS)))
@pytest.mark.parametrize("name", BACKENDS)
def test_ranks_are_one_batch(ranks, job, name):
    members, counts = JOBS[job]
    given, size = maps(sum(counts)), len(members)
    truth = of_modulation(modulation_formula, *given)
    parts = [ranks[rank][job, name] for rank in members]
    for i, (of_ranks, whole) in enumerate(zip(zip(*parts), truth)):
        ours = torch.cat(of_ranks) if i else sum(of_ranks)
        torch.testing.assert_close(ours, whole)
    truth = of_words(*features(sum(counts)))
    for i, (of_ranks, whole) in enumerate(zip(zip(*(part[7:] for part in parts)), truth)):
        # each rank has the whole loss; gradients are averaged over ranks
        share = (1, 1 / size, 1 / size, 1 / size**2, 1 / size**2)[i]
        for ours in [torch.cat(of_ranks)] if i else of_ranks:
            torch.testing.assert_close(ours * share, whole)


@pytest.mark.parametrize("job", range(len(JOBS)))
def test_running_statistics(ranks, job):
    members, counts = JOBS[job]
    first, *others = (ranks[rank][job] for rank in members)
    assert all(torch.equal(other, first) for other in others)
    torch.testing.assert_close(first, moved(*maps(sum(counts))[:3]))


def test_compiled_without_a_graph_break(ranks):
    members, counts = JOBS[COMPILED]
    truth = of_modulation(modulation, *maps(sum(counts)))[1:4]
    for of_ranks, whole in zip(zip(*(ranks[rank]["compiled"] for rank in members)), truth):
        torch.testing.assert_close(torch.cat(of_ranks), whole)
