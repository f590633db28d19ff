"""Checkpoint files, their order on disk, how often they come, and which models can have them."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi.attention.layout import Layout, Piece
from cpmpi.comm.stop import Stop, listening
from cpmpi.engine import pace as pace_module
from cpmpi.engine.options import JobOptions
from cpmpi.engine.pace import LARGEST_PART, NODE_FAILURE_S, Pace
from cpmpi.errors import UserError
from cpmpi.model.blocks import blocks_of
from cpmpi.model.probe import probe
from cpmpi.run import checkpoint
from cpmpi.run.hidden import SavedHidden, write_part
from cpmpi.run.manifest import Manifest
from cpmpi.run.paths import RunPaths
from tests.sweep import OWN
from tests.test_tensor_parallel import skeleton

IDENTITY, WIDTH, TOKENS = "0123456789abcdef" * 4, 5, 37


def hidden_of(layer, dtype=torch.float32):
    """The whole document's hidden state (T, WIDTH) after a layer; the same every time."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(layer)).to(dtype)


def write(folder, layer, world=3, segments=2, dtype=torch.float32):
    """A whole checkpoint by ``world`` ranks, published."""
    hidden, layout = hidden_of(layer, dtype), Layout(n_tokens=TOKENS, world=world, segments=segments)
    parts = [
        write_part(folder, IDENTITY, layer, rank, [(piece, hidden[slice(*piece)]) for piece in layout.pieces(rank)])
        for rank in range(world)
    ]
    manifest = Manifest(
        identity=IDENTITY, layer=layer, attention=layer + 1, n_tokens=TOKENS, shape=(WIDTH,),
        dtype=str(dtype).removeprefix("torch."), seconds=1.5, parts=tuple(parts),
    )  # fmt: skip
    checkpoint.publish(folder, manifest)
    return manifest


def names(folder):
    return sorted(path.name for path in RunPaths(folder).checkpoints.iterdir())


@settings(max_examples=20, deadline=None)
@given(
    world=st.integers(1, 50), segments=st.integers(1, 5), start=st.integers(0, TOKENS - 1), data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_rows_come_back_bit_for_bit(tmp_path_factory, world, segments, start, data, dtype):
    """Whoever wrote them: also more ranks than tokens, ranks without any."""
    folder = tmp_path_factory.mktemp("run")
    manifest = write(folder, 3, world, segments, dtype)
    ((_, found),) = checkpoint.find(folder, IDENTITY)
    assert found == manifest
    stop = data.draw(st.integers(start + 1, TOKENS))
    saved = SavedHidden(folder, found)
    for rank in range(4):
        saved.check(rank, 4)
    rows = saved.rows(start, stop)
    saved.close()
    assert rows.dtype == dtype
    assert torch.equal(rows, hidden_of(3, dtype)[start:stop])


def test_any_hdf5_tool_reads_it(tmp_path):
    write(tmp_path, 3, dtype=torch.bfloat16)
    with h5py.File(RunPaths(tmp_path).checkpoint_part(IDENTITY, 3, 1)) as file:
        assert [dim.label for dim in file["hidden"].dims] == ["token", "dim"]
        rows = [row for start, stop in file["runs"][:] for row in range(start, stop)]
        np.testing.assert_array_equal(file["hidden"][:], hidden_of(3, torch.bfloat16)[rows].float())


def test_the_next_one_replaces_the_one_before(tmp_path):
    write(tmp_path, 3, world=4)
    assert len(names(tmp_path)) == 5
    write(tmp_path, 4, world=2)
    assert len(names(tmp_path)) == 3
    assert all(name.startswith("0123456789ab-layer-00004") for name in names(tmp_path))
    checkpoint.delete(tmp_path, IDENTITY)
    assert names(tmp_path) == []


def test_files_of_a_later_layer_stay_while_an_earlier_one_is_published(tmp_path):
    """They may be in work; those of other documents stay for their turn."""
    manifest = write(tmp_path, 4)
    for name in ("0123456789ab-layer-00005-rank-00000.h5.tmp", "0123456789ac-layer-00009-rank-00000.h5"):
        (RunPaths(tmp_path).checkpoints / name).touch()
    checkpoint.publish(tmp_path, manifest)
    assert len(names(tmp_path)) == 6
    checkpoint.delete(tmp_path, IDENTITY, keep=4)
    assert len(names(tmp_path)) == 5
    checkpoint.delete_others(tmp_path, ["0123456789ac" + "0" * 52])
    assert names(tmp_path) == ["0123456789ac-layer-00009-rank-00000.h5"]


def test_nothing_is_named_before_it_is_durable(tmp_path, monkeypatch):
    """Every file is synced before its rename, the folder after it; the manifest is last, and old ones go after it."""
    write(tmp_path, 3, world=2)
    events, opened = [], {}
    real = {name: getattr(os, name) for name in ("fsync", "replace", "open")}

    def open_(path, *args, **kwargs):
        descriptor = real["open"](path, *args, **kwargs)
        opened[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", opened[fd])), real["fsync"](fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", Path(b).name)), real["replace"](a, b)))
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda p, **k: (events.append(("delete", p.name)) if p.exists() else None, unlink(p, **k))
    )
    write(tmp_path, 4, world=1)
    part, manifest = "0123456789ab-layer-00004-rank-00000.h5", "0123456789ab-layer-00004.json"
    old = [f"0123456789ab-layer-00003{end}" for end in (".json", "-rank-00000.h5", "-rank-00001.h5")]
    expected = [
        ("sync", f"{part}.tmp"), ("name", part), ("sync", "checkpoints"), ("sync", part),
        ("sync", f"{manifest}.tmp"), ("name", manifest), ("sync", "checkpoints"), ("delete", old[0]),
    ]  # fmt: skip
    found = [event for event in events if event != ("sync", tmp_path.name)]
    assert found[: len(expected)] == expected
    assert sorted(found[len(expected) : -1]) == [("delete", name) for name in old[1:]]
    assert found[-1] == ("sync", "checkpoints")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def whole(folder, found):
    """Open and check a checkpoint as all ranks together do."""
    if isinstance(found, UserError):
        raise found
    saved = SavedHidden(folder, found)
    try:
        saved.check(0, 1)
    finally:
        saved.close()
    return saved.rows


@pytest.mark.parametrize("what", ["hidden", "checksum", "runs"])
def test_a_flipped_bit_is_found(tmp_path, what):
    write(tmp_path, 3)
    path = RunPaths(tmp_path).checkpoint_part(IDENTITY, 3, 1)
    with h5py.File(path) as file:
        at = file[what].id.get_offset()
    flip(path, at)
    ((_, found),) = checkpoint.find(tmp_path, IDENTITY)
    with pytest.raises(UserError, match=r"rank-00001.h5.*(checksum|not the file|every token once|damaged|changed)"):
        whole(tmp_path, found)


def test_every_flipped_or_missing_byte_of_a_manifest_is_found(tmp_path):
    write(tmp_path, 3)
    path = RunPaths(tmp_path).checkpoint(IDENTITY, 3)
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]):
            path.write_bytes(bad)
            ((_, found),) = checkpoint.find(tmp_path, IDENTITY)
            assert isinstance(found, UserError) or found == Manifest.read(path), at
            if not isinstance(found, UserError):  # white space
                path.write_bytes(good)
                assert found == Manifest.read(path)


def test_files_of_other_checkpoints_are_found(tmp_path):
    manifest = write(tmp_path, 3)
    paths = RunPaths(tmp_path)
    second, third = (paths.checkpoint_part(IDENTITY, 3, rank) for rank in (1, 2))
    good = second.read_bytes()
    cases = {
        "of rank 2, not 1": third.read_bytes(), "cannot be read as HDF5|truncated": good[:900], "no such file": None,
        "not the file|laid out with": good + b"\0",
    }  # fmt: skip
    for reason, data in cases.items():
        second.unlink()
        if data is not None:
            second.write_bytes(data)
        with pytest.raises(UserError, match=reason):
            whole(tmp_path, manifest)
        second.write_bytes(good)
    whole(tmp_path, manifest)
    with pytest.raises(UserError, match="every token once"):
        whole(tmp_path, replace(manifest, parts=manifest.parts[:2]))
    with pytest.raises(UserError, match=r"of identity 0123\w+, not s"):
        whole(tmp_path, replace(manifest, identity="s"))
    assert isinstance(checkpoint.find(tmp_path, IDENTITY[:12] + "0" * 52)[0][1], UserError)
    assert checkpoint.find(tmp_path, "f" * 64) == []


def test_the_latest_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "delete", lambda *_, **__: None)  # killed before
    for layer in (9, 10, 11):
        write(tmp_path, layer)
    RunPaths(tmp_path).checkpoint(IDENTITY, 10).write_text("{}")
    found = [manifest for _, manifest in checkpoint.find(tmp_path, IDENTITY)]
    assert [m if isinstance(m, UserError) else m.layer for m in found] == [11, found[1], 9]
    assert isinstance(found[1], UserError)


def test_how_often(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now[0])
    pace = Pace(choice="auto", nodes=4, write_s=2.0)
    assert pace.interval_s == pytest.approx((2 * 2.0 * NODE_FAILURE_S / 4) ** 0.5)
    pace.taken()
    now[0] += pace.interval_s - 1
    assert not pace.due
    now[0] += 1
    assert pace.due
    pace.measured(0.5)  # the guess does not count any longer
    assert pace.write_s == 0.5
    pace.measured(0.25)
    assert pace.write_s == 0.5
    many = Pace(choice="auto", nodes=10_000, write_s=2.0)
    assert many.interval_s == 2.0 / LARGEST_PART
    assert Pace(choice="1.5", nodes=1, write_s=2.0).interval_s == 90
    every = Pace(choice="0", nodes=1, write_s=2.0)
    every.taken()
    assert every.due
    assert Pace(choice="off", nodes=1, write_s=2.0).off


@pytest.mark.parametrize("value", ["often", "-1", "nan", "inf", ""])
def test_nonsense_is_refused(value):
    with pytest.raises(UserError, match=r"^--checkpoint .*: choose auto, off, or minutes such as 15$"):
        JobOptions(model="m", inputs="d", output="r", checkpoint=value)


def test_signals_set_a_flag_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for number in before:
        with listening(20) as stop:
            assert stop.left_s == float("inf")
            signal.raise_signal(number)
            first = stop.asked_s
            signal.raise_signal(number)
            assert stop.asked
            assert stop.asked_s == first
            assert 0 < stop.left_s <= 20
    assert before == {number: signal.getsignal(number) for number in before}

    def in_a_thread():
        with listening(20) as stop:
            found.append(stop)

    found: list[Stop] = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert not found[0].asked


@pytest.mark.parametrize(
    ("model_type", "whole", "reason"),
    [
        ("llama", 3, ""),
        ("longcat_flash", 1, ""),  # two attentions in each of two layers
        ("gemma3n_text", 0, "does not return a hidden state per token"),  # four streams of hidden states
        ("hrm_text", 0, "in no list of layers that run one after the other"),  # layers that run several times
    ],
)
def test_which_models_can_go_on(model_type, whole, reason):
    model = skeleton(model_type, **OWN.get(model_type, {}))
    blocks = blocks_of(model, probe(model))
    assert len(blocks.whole) == whole
    assert reason in blocks.reason
    assert bool(reason) == bool(blocks.reason)


def test_keys_that_a_later_layer_shares_are_found(monkeypatch):
    """Though nothing is computed with them but attention."""
    from transformers.models.llama import modeling_llama

    rotate, made = modeling_llama.apply_rotary_pos_emb, []

    def rotate_or_share(q, k, *args, **kwargs):
        made.append(rotate(q, k, *args, **kwargs))
        return made[-1][0], made[0][1] if len(made) == 3 else made[-1][1]

    model = skeleton("llama")
    layers = probe(model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_or_share)
    assert blocks_of(model, layers).whole == {2}


def test_what_a_later_layer_uses_of_an_earlier_one_is_found():
    """Hidden states, values, a view of a state; embeddings are there when the document goes on, too."""

    def hidden_of_first(model, kept):
        first, last = model.model.layers[0], model.model.layers[3]
        first.register_forward_hook(lambda _, __, out: kept.append(out))
        last.register_forward_pre_hook(lambda _, args: (args[0] + kept[-1], *args[1:]))

    def values_of_first(model, kept):
        first, last = model.model.layers[0].self_attn.v_proj, model.model.layers[3].self_attn.v_proj
        first.register_forward_hook(lambda _, __, out: kept.append(out))
        last.register_forward_hook(lambda _, __, out: kept[-1])

    def view_of_first(model, kept):
        first, last = model.model.layers[0].mlp, model.model.layers[3].mlp
        first.register_forward_hook(lambda _, __, out: kept.append(out[..., :1]))
        last.register_forward_hook(lambda _, __, out: out * kept[-1])

    def embeddings(model, kept):  # are there when the document goes on, too
        model.model.embed_tokens.register_forward_hook(lambda _, __, out: kept.append(out))
        model.model.layers[3].register_forward_pre_hook(lambda _, args: (args[0] + kept[-1], *args[1:]))

    def in_place(model, _):
        model.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0].add_(1), *args[1:]))

    expected = {hidden_of_first: {0}, values_of_first: set(), view_of_first: set(), embeddings: {0, 1, 2}}
    for change, whole in {**expected, in_place: {0, 1, 2}}.items():
        model = skeleton("llama")
        layers = probe(model)
        change(model, [])
        blocks = blocks_of(model, layers)
        assert blocks.whole == whole, change.__name__
        assert bool(blocks.reason) == (len(whole) < 3)
        assert blocks.in_place == (change is in_place)


def test_pieces_cover_a_checkpoint_once(tmp_path):
    """A token that two ranks wrote, or none, is no checkpoint."""
    rows = hidden_of(3)
    for runs in ([(0, 20), (19, TOKENS)], [(0, 20), (21, TOKENS)], [(1, TOKENS)]):
        parts = [
            write_part(tmp_path, IDENTITY, 3, rank, [(Piece(*run), rows[slice(*run)])]) for rank, run in enumerate(runs)
        ]
        manifest = Manifest(
            identity=IDENTITY, layer=3, attention=4, n_tokens=TOKENS, shape=(WIDTH,), dtype="float32",
            seconds=0.0, parts=tuple(parts),
        )  # fmt: skip
        with pytest.raises(UserError, match="every token once"):
            SavedHidden(tmp_path, manifest)
