"""Batches hold the pictures and features of the same captions, and take up where they stopped."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from small import Letters

from fastxm.data import open_dataset, text_features
from fastxm.training.batches import CaptionedBatches, split, unpacked
from fastxm.training.gan import sample_captions


def opened(folder, **options):
    dataset = open_dataset(folder, 64, progress=False)
    return CaptionedBatches(
        dataset, text_features(dataset, Letters(), progress=False), 6, **options
    )


def test_a_batch_belongs_together(folder):
    batches = opened(folder)
    batch = next(iter(batches))
    encoded = Letters()(batch["caption"])
    for k, (index, caption) in enumerate(zip(batch["index"].tolist(), batch["caption"])):
        assert caption in batches.dataset.captions[index]
        assert torch.equal(batch["image"][k], batches.dataset.image(index))
    assert torch.equal(batch["lengths"], encoded.lengths)
    # features are kept in half precision
    torch.testing.assert_close(batch["words"], encoded.words.half().float())
    torch.testing.assert_close(batch["sentence"], encoded.sentence.half().float())


def test_bytes_are_unpacked_to_the_same_pictures(folder):
    dataset = open_dataset(folder, 64, progress=False)
    images = unpacked(dataset.pixels([3, 1]))
    assert torch.equal(images, dataset.batch([3, 1]))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_position_is_taken_up(folder):
    batches = opened(folder, seed=3)
    stream = iter(batches)
    next(stream)
    state = batches.state_dict()
    expected = [next(stream)["index"] for _ in range(3)]
    again = opened(folder, seed=4)
    again.load_state_dict(state)
    found = [batch["index"] for batch, _ in zip(again, range(3))]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
        for name, value in one.items()
    )


def taken(batches, count: int) -> list:
    return [batch for _, batch in zip(range(count), batches)]


def test_what_is_read_ahead_is_what_would_have_been_read(folder):
    found = []
    for ahead in (0, 1, 3):
        torch.manual_seed(0)  # of the flips
        found.append(taken(opened(folder, seed=3, flip=True, ahead=ahead), 6))
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(*found))


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_position_is_of_what_was_handed_out(folder, ahead):
    expected = taken(opened(folder, seed=3), 6)
    batches = opened(folder, seed=3, ahead=ahead)
    stream = iter(batches)
    for _ in range(2):
        next(stream)
    state = batches.state_dict()
    assert state["batches"] == 2
    assert equal(next(stream), expected[2])  # the state is no view of what moves on
    again = opened(folder, seed=4, ahead=ahead)
    again.load_state_dict(state)
    assert all(map(equal, taken(again, 4), expected[2:]))
    stream.close()  # what it had read beyond is not lost to the next
    assert all(map(equal, taken(batches, 3), expected[3:]))


def test_a_fault_in_reading_is_raised_where_the_batch_is_taken(folder):
    batches = opened(folder, ahead=2)
    read, calls = batches.read, []

    def fail(indices, numbers):
        calls.append(indices)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return read(indices, numbers)

    batches.read = fail
    stream = iter(batches)
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert batches.state_dict()["batches"] <= 2


def test_batches_are_read_while_others_are_learnt_from(folder):
    batches = opened(folder, ahead=3)
    read, started = batches.read, threading.Semaphore(0)

    def noted(indices, numbers):
        started.release()
        return read(indices, numbers)

    batches.read = noted
    stream = iter(batches)
    next(stream)
    for _ in range(4):  # the one that was handed out, and three more
        assert started.acquire(timeout=30)


def test_parts_are_consecutive_and_whole(folder):
    batch = next(iter(opened(folder)))
    parts = split(batch, 3)
    assert [len(part["caption"]) for part in parts] == [2, 2, 2]
    for name, value in batch.items():
        pieces = [part[name] for part in parts]
        if isinstance(value, list):
            assert [text for piece in pieces for text in piece] == value
        else:
            assert torch.equal(torch.cat(pieces), value)


def test_sample_captions_follow_the_weights(folder):
    dataset = open_dataset(folder, 64, progress=False)
    weights = np.zeros(len(dataset))
    weights[2], weights[5] = 1, 3
    weighted = dataclasses.replace(dataset, weights=weights)
    two, five = dataset.captions[2][0], dataset.captions[5][0]
    assert sample_captions([weighted, dataset.select([])], 4) == [two, five, five, five]
    assert len(sample_captions([dataset, weighted], 7)) == 7
