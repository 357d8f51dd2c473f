"""Files of weights: written whole or not at all, read without running code, and errors that name what is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import resource
import signal
import zipfile

import pytest
import torch
from helpers.weight_files import Claim, Malicious, flipped, write_archive, write_claim

from byola_fast import BYOL, AudioNTT2020, load_encoder
from byola_fast.networks import checkpoint
from byola_fast.networks.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from byola_fast.networks.encoder_file import load_encoder_weights, read_encoder, save_encoder


def make_encoder(d: int = 16) -> AudioNTT2020:
    return AudioNTT2020(n_mels=8, d=d)


def test_content_comes_back(tmp_path):
    content = {"weights": torch.randn(3), "config": {"lr": 3e-4, "name": "a"}, "list": [1, None, True]}
    save_checkpoint(tmp_path / "new" / "a.pt", content)
    loaded = load_checkpoint(tmp_path / "new" / "a.pt")
    assert torch.equal(loaded.pop("weights"), content.pop("weights"))
    assert loaded == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.pt"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failure_while_saving_leaves_the_old_file_whole(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"step": 1})
    old = path.read_bytes()

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half_written(_content, file):
        file.write(b"PK\x03\x04 half of it")
        full()

    target = {"write": (checkpoint.torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[failing]
    monkeypatch.setattr(*target, half_written if failing == "write" else full)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written: No space left on device; .* unchanged"):
        save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_the_system_error_is_in_the_message(tmp_path):
    """torch.save wraps a failing write in words of its own; the limit is a real one."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written: File too large; .* unchanged"):
            save_checkpoint(path, {"weights": torch.randn(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(path) == {"step": 1}


def test_a_process_killed_while_saving_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"step": 1})
    child = os.fork()
    if child == 0:  # dies as by kill -9, with half of the new file written
        checkpoint.torch.save = lambda _content, file: (file.write(b"PK\x03\x04 half"), file.flush(), os._exit(9))
        save_checkpoint(path, {"step": 2})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.glob("a.pt.*.tmp"))) == 1
    assert load_checkpoint(path) == {"step": 1}
    save_checkpoint(path, {"step": 3})
    assert load_checkpoint(path) == {"step": 3}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("protocol", ["archive", 2, 4])
def test_pickled_code_is_refused_and_not_run(tmp_path, protocol):
    path, mark = tmp_path / "a.pt", tmp_path / "ran"
    if protocol == "archive":
        torch.save({"state_dict": Malicious(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Malicious(mark)}, protocol))
    words = r"refused" if protocol == 4 else r"pickled code \((posix|nt)\.system\), which is refused"
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()  # the attack itself works


def test_unusable_files_say_what_is_wrong(tmp_path):
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, {"weights": torch.randn(1000)})
    (tmp_path / "truncated.pt").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello, these are no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, words in {
        "truncated.pt": "truncated or damaged (2000 bytes)",
        "empty.pt": "empty file",
        "text.pt": "not a checkpoint",
        "list.pt": "expected a dict of weights, got list",
        "missing.pt": "No such file or directory",
        ".": "Is a directory",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(words)) as error:
            load_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_the_folder_of_a_run_names_its_weights(tmp_path):
    for name in ("checkpoint.pt", "encoder.pth"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=re.escape(f"Is a directory; give a file, such as {tmp_path / name}")):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["encoder.pth", "encoder.pt", "encoder.safetensors"])
@pytest.mark.parametrize("stats", [(-7.1, 1 / 3), None])
def test_encoder_file_holds_plain_values_and_reloads(tmp_path, name, stats):
    encoder, other = make_encoder().to(memory_format=torch.channels_last), make_encoder()
    config = {"feature_d": 16, "f_min": 0.1, "norm": None, "note": "größer"}
    save_encoder(tmp_path / name, encoder, config=config, stats=stats)
    content = load_checkpoint(tmp_path / name)
    assert content["config"] == config
    assert content["stats"] == (None if stats is None else list(stats))
    assert all(tensor.is_contiguous() for tensor in content["state_dict"].values())
    load_encoder_weights(other, tmp_path / name)
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_safetensors_as_other_tools_read_and_write_them(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    encoder, other = make_encoder(), make_encoder()
    save_encoder(tmp_path / "a.safetensors", encoder, config={"feature_d": 16}, stats=(-7.5, 4.25))
    assert load_file(tmp_path / "a.safetensors").keys() == encoder.state_dict().keys()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        described = json.loads(file.metadata()["byola_fast"])
    assert described == {"config": {"feature_d": 16}, "stats": [-7.5, 4.25]}
    save_file({"encoder." + name: x for name, x in encoder.state_dict().items()}, tmp_path / "b.safetensors")
    load_encoder_weights(other, tmp_path / "b.safetensors")
    assert torch.equal(other.fc[3].weight, encoder.fc[3].weight)


def test_unusable_safetensors_say_what_is_wrong(tmp_path):
    from safetensors.torch import save_file

    whole = tmp_path / "whole.safetensors"
    save_encoder(whole, make_encoder(), config={}, stats=None)
    content = whole.read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(content[:-100])
    (tmp_path / "header.safetensors").write_bytes(content[:50])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("hello, these are no weights")
    torch.save({"state_dict": {}}, tmp_path / "pickled.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, metadata in (("json", "{"), ("list", "[1]")):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors", {"byola_fast": metadata})
    for name, words in {
        "truncated": f"truncated, damaged or no safetensors file ({len(content) - 100} bytes)",
        "header": "truncated, damaged or no safetensors file (50 bytes)",
        "empty": "empty file (0 bytes)",
        "text": "truncated, damaged or no safetensors file",
        "pickled": "truncated, damaged or no safetensors file",
        "folder": "Is a directory",
        "missing": "No such file or directory",
        "json": "the metadata 'byola_fast' is not JSON",
        "list": "the metadata 'byola_fast' is no JSON object",
    }.items():
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(CheckpointError, match=re.escape(words)) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value)


def test_encoder_files_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"encoder\.onnx: expected a name ending in \.pth, \.pt or \.safetensors"):
        save_encoder(tmp_path / "encoder.onnx", make_encoder(), config={}, stats=None)
    with pytest.raises(CheckpointError, match="config: cannot be written as JSON"):
        save_encoder(tmp_path / "a.safetensors", make_encoder(), config={"path": tmp_path}, stats=None)
    path = tmp_path / "b.safetensors"
    save_encoder(path, make_encoder(), config={}, stats=None)
    old = path.read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; the file of that name is unchanged"):
        save_encoder(path, make_encoder(), config={}, stats=None)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "online.encoder.", "module.online.encoder."])
@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model",), ("model", "state_dict")])
def test_wrapped_and_prefixed_weights(tmp_path, prefix, wrappers):
    encoder, other = make_encoder(), make_encoder()
    content = {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    if prefix:
        content |= {"predictor.0.weight": torch.ones(2, 2)}
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pt")
    load_encoder_weights(other, tmp_path / "a.pt")
    assert torch.equal(other.fc[3].weight, encoder.fc[3].weight)
    assert torch.equal(other.features[8].weight, encoder.features[8].weight)


def test_of_a_whole_run_the_online_encoder_is_taken(tmp_path):
    byol, other = BYOL(make_encoder(), proj_size=4, proj_dim=8), make_encoder()
    torch.nn.init.ones_(byol.encoder.fc[0].bias)
    save_checkpoint(tmp_path / "checkpoint.pt", {"model": byol.state_dict(), "step": 1})
    load_encoder_weights(other, tmp_path / "checkpoint.pt")
    assert torch.equal(other.fc[0].bias, torch.ones(16))


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path):
    encoder = make_encoder()
    state = make_encoder().state_dict()
    del state["features.4.bias"]
    state |= {"fc.3.weight": torch.zeros(9, 9), "head.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "a.pt")
    before = encoder.fc[0].weight.clone()
    with pytest.raises(CheckpointError) as error:
        load_encoder_weights(encoder, tmp_path / "a.pt")
    for words in (
        "a.pt: not the weights of this AudioNTT2020",
        "1 missing: features.4.bias",
        "1 unexpected: head.weight",
        "1 of another shape: fc.3.weight (9, 9) instead of (16, 16)",
    ):
        assert words in str(error.value)
    assert torch.equal(encoder.fc[0].weight, before)


def test_counters_of_batches_may_be_absent(tmp_path):
    encoder, other = make_encoder(), make_encoder()
    state = {name: x for name, x in encoder.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pt")
    load_encoder_weights(other, tmp_path / "a.pt")
    assert torch.equal(other.fc[0].weight, encoder.fc[0].weight)


# damage


CONTENT = {"state_dict": {"a": torch.randn(5), "b": torch.randn(7).half(), "n": torch.tensor(7)}, "config": {"x": 1.5}}


def same(given, wanted):
    if isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(same(given[name], wanted[name]) for name in wanted)
    if isinstance(wanted, torch.Tensor):
        return given.dtype == wanted.dtype and given.shape == wanted.shape and torch.equal(given, wanted)
    return given == wanted


def check_flips(path, bits):
    """Each gives an error that names the file, or exactly the content."""
    content, wanted, refused = path.read_bytes(), load_checkpoint(path), 0
    for damaged in flipped(content, bits):
        path.write_bytes(damaged)
        try:
            assert same(load_checkpoint(path), wanted)
        except CheckpointError:
            refused += 1
    assert refused > len(bits) // 3


def test_a_flipped_bit_of_an_archive_is_found_or_harmless(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, CONTENT)
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))  # of the first tensor, in the directory
    check_flips(path, [*range(8 * entry, 8 * (entry + 60)), *range(0, 8 * len(content), 41)])


def test_a_flipped_bit_of_safetensors_is_found_or_harmless(tmp_path):
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in CONTENT["state_dict"].items():
                self.register_buffer(name, tensor)

    path = tmp_path / "a.safetensors"
    save_encoder(path, Encoder(), config=CONTENT["config"], stats=(-7.1, 4.2))
    check_flips(path, range(0, 8 * path.stat().st_size, 5))


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:The PyTorch API of nested")
def test_values_that_are_no_dense_tensors_are_refused(tmp_path):
    one = torch.ones(3)
    kinds = {
        "sparse": one.to_sparse(),
        "meta": one.to("meta"),
        "qtensor": torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([one, one[:2]]),
        "rebuild_tensor_v3": one.to(torch.float8_e4m3fn),
        "Linear": torch.nn.Linear(1, 1),
        "bytearray": bytearray(3),
    }
    for name, value in kinds.items():
        torch.save({"a": value}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=rf"a\.pth: holds pickled code \(.*{name}.*\), which is refused; exp"):
            load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "claim",
    [
        Claim(4, 0, (1 << 35,), (1,)),  # 137 GB
        Claim(1 << 35, 0, (4,), (1,)),
        Claim(1 << 35, 0, (1 << 35,), (1,)),
        Claim(4, 1 << 35, (1,), (1,)),
        Claim(4, 1, (4,), (1,)),
        Claim(4, 3, (2,), (-1,)),
        Claim(4, -1, (1,), (1,)),
        Claim(-4, 0, (1,), (1,)),
        Claim(4, 0, (2, 2), (1,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, claim, legacy):
    write_claim(tmp_path / "a.pth", claim, legacy=legacy)
    with pytest.raises(CheckpointError, match=r"a\.pth: truncated or damaged \(\d+ bytes\)"):
        load_checkpoint(tmp_path / "a.pth")
    write_claim(tmp_path / "a.pth", Claim(4, 0, (4,), (1,)), legacy=legacy)
    assert torch.equal(load_checkpoint(tmp_path / "a.pth")["a"], torch.zeros(4))


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # bytearray(2**31 - 1)
        b"\x80\x02}r\xff\xff\xff\xf0\x8e\xff\xff\xff\xff\x7f\0\0\0x.",  # a memo and bytes of absurd size
    ],
)
def test_a_pickle_that_asks_for_memory_is_refused(tmp_path, pickled):
    write_archive(tmp_path / "a.pth", pickled)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"a\.pth: "):
        load_checkpoint(tmp_path / "a.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
        b"\x80\x02}()" + b"\x85" * 300_000 + b"Nu.",
        b"\x80\x02ccollections\nOrderedDict\n])" + b"\x85" * 300_000 + b"N\x86a\x85R.",
        b"\x80\x04\x8f()" + b"\x85" * 300_000 + b"\x90.",
    ],
)
def test_a_deep_key_does_not_overflow_the_stack(tmp_path, pickled):
    write_archive(tmp_path / "a.pth", pickled)
    with pytest.raises(CheckpointError, match=r"a\.pth: truncated or damaged"):
        load_checkpoint(tmp_path / "a.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    """Its records may grow to any size."""
    write_archive(tmp_path / "a.pth", pickle.dumps({}, 2), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"a\.pth: truncated or damaged"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_is_refused(tmp_path, suffix):
    pipe, loop, device = (tmp_path / (name + suffix) for name in ("pipe", "loop", "device"))
    os.mkfifo(pipe)  # reading one would wait for ever
    loop.symlink_to(loop)
    device.symlink_to("/dev/zero")
    for path, words in ((pipe, "a pipe"), (loop, "Too many levels"), (device, "device"), (f"a\0{suffix}", "null")):
        with pytest.raises(CheckpointError, match=words) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value)


WEIGHT = torch.ones(16, 16)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({"fc.3.weight": WEIGHT.to(dtype)}, f"1 of another dtype: fc.3.weight {dtype} instead of torch.float32")
            for dtype in (torch.int64, torch.bool, torch.complex64, torch.int8)
        ),
        ({"fc.3.weight": WEIGHT * math.nan}, r"1 not finite in torch.float32: fc.3.weight \(256 of 256 values\)"),
        ({"fc.3.bias": torch.tensor([math.inf] + 15 * [0.0])}, r"fc.3.bias \(1 of 16 values\)"),
        ({"fc.3.weight": WEIGHT.double() * 1e300}, "1 not finite in torch.float32: fc.3.weight"),
        ({"features.1.running_var": -torch.ones(64)}, r"1 negative: features.1.running_var \(64 of 64 values\)"),
        ({"features.1.num_batches_tracked": torch.tensor(-1)}, "1 negative: features.1.num_batches_tracked"),
        ({"features.1.num_batches_tracked": torch.tensor(1.0)}, "num_batches_tracked torch.float32 instead of torch.i"),
    ],
)
def test_weights_that_cannot_be_are_named_and_change_nothing(tmp_path, suffix, change, words):
    from safetensors.torch import save_file

    encoder, state = make_encoder(), make_encoder().state_dict() | change
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pth" else save_file)(dict(state), path)
    with pytest.raises(CheckpointError, match=words) as error:
        load_encoder_weights(encoder, path)
    assert str(path) in str(error.value)
    assert same(encoder.state_dict(), before)


def test_a_tensor_of_one_repeated_value_allocates_nothing(tmp_path):
    """A file of 1 KB once made an encoder of 4 GB."""
    wide = {"fc.0.weight": (1 << 30, 64), "fc.0.bias": (1 << 30,), "fc.3.weight": (1 << 30, 1 << 30)}
    state = make_encoder().state_dict() | {name: torch.zeros(1).expand(shape) for name, shape in wide.items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="3 of fewer values than their shape"):
        read_encoder(tmp_path / "a.pth")


@pytest.mark.parametrize("widths", [{"feature_d": 1 << 34}, {"n_mels": 1 << 34}, {"feature_d": 0}])
def test_widths_in_a_file_allocate_nothing(tmp_path, widths):
    save_encoder(tmp_path / "a.pth", make_encoder(), config=widths, stats=None)
    with pytest.raises(CheckpointError, match=r"a\.pth: "):
        read_encoder(tmp_path / "a.pth", "AudioNTT2020")


def test_a_load_that_fails_half_way_changes_nothing(tmp_path):
    class Own(AudioNTT2020):
        fails = True

        def load_state_dict(self, *args, **kwargs):
            super().load_state_dict(*args, **kwargs)
            if self.fails:
                self.fails = False
                raise RuntimeError("half way")

    save_encoder(tmp_path / "a.pth", make_encoder(), config={}, stats=None)
    encoder = Own(n_mels=8, d=16)
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"a\.pth: not the weights of this Own; half way"):
        load_encoder_weights(encoder, tmp_path / "a.pth")
    assert same(encoder.state_dict(), before)


@pytest.mark.parametrize(
    "more", [{"stats": None}, {"stats": (0.0, 0.0)}, {"config": {"n_fft": 1 << 30}}, {"config": {"n_fft": 1 << 24}}]
)
def test_a_refused_file_leaves_the_encoder_as_it_was(tmp_path, more):
    encoder = make_encoder().train()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    save_encoder(tmp_path / "a.pth", make_encoder(), **{"config": {}, "stats": (-7.1, 4.2)} | more)
    with pytest.raises(CheckpointError, match=r"a\.pth: "):
        load_encoder(tmp_path / "a.pth", encoder=encoder)
    assert same(encoder.state_dict(), before)
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_mask_of_infinity_in_the_network_itself_is_loaded(tmp_path):
    class Own(AudioNTT2020):
        def __init__(self):
            super().__init__(n_mels=8, d=16)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    save_encoder(tmp_path / "a.pth", Own(), config={}, stats=None)
    load_encoder_weights(Own(), tmp_path / "a.pth")
    other = Own()
    other.mask.zero_()
    with pytest.raises(CheckpointError, match=r"1 not finite in torch.float32: mask \(1 of 2 values\)"):
        load_encoder_weights(other, tmp_path / "a.pth")
