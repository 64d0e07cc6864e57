"""The official checkpoints are imitated: classes of our own, in modules of the official names.

The modules are gone when the file is read. The forward passes are written apart from the package's.
"""

import pickle
import sys
import types
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tinydet.backbones.factory import create_backbone
from tinydet.backbones.yolov5_checkpoint import (
    convert_official,
    is_official,
    load_official,
    rename_official,
)


class Conv(nn.Module):
    def __init__(self, inputs, outputs, kernel=1, stride=1, padding=None):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.cv1 = Conv(channels, channels)
        self.cv2 = Conv(channels, channels, 3)

    def forward(self, x):
        return self.cv2(self.cv1(x)) + x


class C3(nn.Module):
    def __init__(self, channels, count):
        super().__init__()
        self.cv1 = Conv(channels, channels // 2)
        self.cv2 = Conv(channels, channels // 2)
        self.cv3 = Conv(channels, channels)
        self.m = nn.Sequential(*(Bottleneck(channels // 2) for _ in range(count)))

    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.cv1 = Conv(channels, channels // 2)
        self.cv2 = Conv(channels * 2, channels)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = self.cv1(x)
        # The pools of the slower form, each from the input itself.
        pools = [F.max_pool2d(x, size, 1, size // 2) for size in (5, 9, 13)]
        return self.cv2(torch.cat([x, *pools], 1))


class DetectionModel(nn.Module):
    def __init__(self, first=None):
        super().__init__()
        self.model = nn.Sequential(
            first or Conv(3, 16, 6, 2, 2),
            *(Conv(16, 32, 3, 2), C3(32, 1), Conv(32, 64, 3, 2), C3(64, 2)),
            *(Conv(64, 128, 3, 2), C3(128, 3), Conv(128, 256, 3, 2), C3(256, 1), SPPF(256)),
            *(Conv(256, 128), nn.Upsample(scale_factor=2)),  # the neck begins
        )
        self.names = {0: "person"}
        self.register_buffer("anchors", torch.ones(3, 2))

    def features(self, x):
        found = []
        for i, layer in enumerate(self.model[:10]):
            x = layer(x)
            found += [x] if i in (0, 2, 4, 6, 9) else []
        return found


class Focus(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Conv(12, 16, 3)


class MustNotRun:
    """Runs `function(*args)` when it is unpickled the usual way."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


_OFFICIAL = {
    "models.common": (Conv, Bottleneck, C3, SPPF, Focus),
    "models.yolo": (DetectionModel,),
}


def _save(thing, path, monkeypatch, **kwargs):
    """Save as the official project does, whose modules exist for that moment only."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "models", types.ModuleType("models"))
        for name, classes in _OFFICIAL.items():
            module = types.ModuleType(name)
            patch.setitem(sys.modules, name, module)
            for cls in classes:
                patch.setattr(cls, "__module__", name)
                setattr(module, cls.__name__, cls)
        torch.save(thing, path, **kwargs)
    assert "models.common" not in sys.modules
    return path


def _network(seed=0):
    torch.manual_seed(seed)
    model = DetectionModel()
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 0:
            tensor.fill_(17)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A published file: half precision, no averaged weights beside it. And the network in it."""
    model = _network().half()
    content = {"epoch": -1, "model": model, "ema": None, "optimizer": None, "date": "2022-02-22"}
    return _save(content, tmp_path / "yolov5n.pt", monkeypatch), model.float()


def _equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_usual_loader_needs_the_official_project(checkpoint):
    with pytest.raises(ModuleNotFoundError, match="models"):
        torch.load(checkpoint[0], weights_only=False)


def test_every_tensor_is_read(checkpoint):
    path, model = checkpoint
    tensors = load_official(path)
    assert list(tensors)[:3] == ["anchors", "model.0.conv.weight", "model.0.bn.weight"]
    _equal(tensors, model.state_dict())


def test_features_are_those_of_the_official_network(checkpoint):
    path, model = checkpoint
    ours = timm.create_model("yolov5n", num_classes=0).eval()
    ours.load_state_dict(convert_official(path))
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        _, found = ours.forward_intermediates(x)
        torch.testing.assert_close(found, model.features(x))


@pytest.mark.parametrize("convert", [False, True])
def test_the_file_and_the_converted_one_are_a_backbone_s_weights(convert, checkpoint, tmp_path):
    path, model = checkpoint
    if convert:
        tensors, path = convert_official(path), tmp_path / "backbone.pt"
        torch.save(tensors, path)
        _equal(convert_official(path), tensors)
    backbone = create_backbone("yolov5n", str(path), "C5")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        (found,) = backbone.module.eval()(x)
        torch.testing.assert_close(found, model.features(x)[-1])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict_ema"])
def test_names_with_a_prefix_are_read(prefix, wrapper, tmp_path):
    tensors = _network().state_dict()
    expected = rename_official(tensors)
    for names in (tensors, expected):
        named = {f"{prefix}{name}": tensor for name, tensor in names.items()}
        torch.save({wrapper: named}, tmp_path / "state.pt")
        _equal(convert_official(tmp_path / "state.pt"), expected)


def test_timm_loads_the_official_names(checkpoint):
    path, model = checkpoint
    overlay = {"state_dict": load_official(path)}
    ours = timm.create_model(
        "yolov5n", features_only=True, pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model.features(x))


def test_the_averaged_weights_are_preferred(tmp_path, monkeypatch):
    trained, averaged = _network(1), _network(2)
    path = _save({"model": trained, "ema": averaged}, tmp_path / "last.pt", monkeypatch)
    _equal(load_official(path), averaged.state_dict())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: {"state_dict": x}])
def test_a_plain_state_dict_is_read(wrap, tmp_path):
    model = _network()
    torch.save(wrap(model.state_dict()), tmp_path / "state.pt")
    _equal(load_official(tmp_path / "state.pt"), model.state_dict())


def test_tensors_that_share_and_stride_a_storage_are_read(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "model.0.a": base.T,
        "model.0.b": base[1:3, ::2],
        "model.0.c": nn.Parameter(base[3]),
        "model.0.d": torch.empty(0, 3),
        "model.0.e": torch.tensor(5),
        "model.0.f": base.bfloat16(),
    }
    torch.save(tensors, tmp_path / "state.pt")
    expected = {k: v.detach().float() if v.is_floating_point() else v for k, v in tensors.items()}
    _equal(load_official(tmp_path / "state.pt"), expected)


def test_nothing_in_the_file_is_run(tmp_path, monkeypatch):
    model, trace = _network(), tmp_path / "it_ran"
    model.extra = MustNotRun(open, str(trace), "w")
    content = {"model": model, "hook": MustNotRun(exec, f"open({str(trace)!r}, 'w')")}
    path = _save(content, tmp_path / "evil.pt", monkeypatch)
    del model.extra
    _equal(load_official(path), model.state_dict())
    assert not trace.exists()
    pickle.loads(pickle.dumps(MustNotRun(open, str(trace), "w"))).close()
    assert trace.exists()  # it would have run


@pytest.mark.parametrize("place", ["alone", "model", "weight"])
def test_a_call_in_place_of_tensors_is_refused_and_not_run(place, tmp_path):
    trace = tmp_path / "it_ran"
    call = MustNotRun(open, str(trace), "w")
    content = {"alone": call, "model": {"model": call}, "weight": {"model.0.conv.weight": call}}
    torch.save(content[place], tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt: not a YOLOv5 .*no network or state dict"):
        load_official(tmp_path / "evil.pt")
    assert not trace.exists()


def test_opcodes_that_set_state_and_items_touch_nothing(tmp_path):
    # GLOBAL, then BUILD, SETITEM, a second call of what a call returned, and NEWOBJ.
    program = (
        b"\x80\x02cos\nsystem\n}U\x01aK\x01sb0"
        b"cbuiltins\n__dict__\nU\x01aK\x01s0"
        b"cos\nsystem\n(U\x04exittR(U\x04exittR0"
        b"cos\nsystem\n(U\x04exitt\x81."
    )
    _write_zip(tmp_path / "evil.pt", {"a/data.pkl": program})
    with pytest.raises(ValueError, match=r"evil\.pt: not a YOLOv5 checkpoint"):
        load_official(tmp_path / "evil.pt")


def _write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
def test_a_file_cut_short_is_refused(keep, checkpoint, tmp_path):
    content = checkpoint[0].read_bytes()
    size = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / "cut.pt").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"cut\.pt: not in torch's zip format, or truncated"):
        load_official(tmp_path / "cut.pt")


def test_a_byte_changed_on_the_way_is_noticed(checkpoint, tmp_path):
    content = bytearray(checkpoint[0].read_bytes())
    content[len(content) // 2] ^= 1  # among the weights, which are most of the file
    (tmp_path / "changed.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"changed\.pt: .*CRC"):
        load_official(tmp_path / "changed.pt")


def _rewritten(path, out, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        files = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    change(files)
    _write_zip(out, {f"x/{name}": content for name, content in files.items()}, compression)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.update({"data/0": files["data/0"][:-2]}), "size of its tensor"),
        (lambda files: files.pop("data/0"), "data/0"),
        (lambda files: files.pop("data.pkl"), "no data.pkl"),
        (lambda files: files.update({"data.pkl": files["data.pkl"][:500]}), "Error"),
        (lambda files: files.update(byteorder=b"big"), "big-endian"),
    ],
)
def test_a_damaged_archive_is_refused(change, message, checkpoint, tmp_path):
    path = _rewritten(checkpoint[0], tmp_path / "damaged.pt", change)
    with pytest.raises(ValueError, match=rf"damaged\.pt: not a YOLOv5 checkpoint .*{message}"):
        load_official(path)


def test_a_compressed_archive_is_refused(checkpoint, tmp_path):
    out = tmp_path / "small.pt"
    path = _rewritten(checkpoint[0], out, lambda _: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"small\.pt: .* is compressed"):
        load_official(path)


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((4, 9), (0, 1), 0), ((9,), (1,), 1), ((3,), (5,), 0)]
)
def test_a_tensor_beyond_its_storage_is_refused(size, stride, offset, tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    storage = torch.arange(9.0)._typed_storage()
    call = MustNotRun(rebuild, storage, offset, size, stride, False, {})
    content = {"model.0.conv.weight": call}
    torch.save(content, tmp_path / "beyond.pt")
    with pytest.raises(ValueError, match=r"beyond\.pt: not a YOLOv5 checkpoint"):
        load_official(tmp_path / "beyond.pt")


def test_a_circle_of_modules_ends(tmp_path, monkeypatch):
    model = _network()
    expected = model.state_dict()
    model.model[11]._modules["back"] = model
    path = _save({"model": model}, tmp_path / "circle.pt", monkeypatch)
    _equal(load_official(path), expected)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pt: no such file"):
        load_official(tmp_path / "none.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"linear\.pt: the layer model\.0 of YOLOv5 .*is missing"):
        convert_official(str(tmp_path / "linear.pt"))
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old\.pt: not in torch's zip format"):
        load_official(tmp_path / "old.pt")


def test_an_older_release_is_refused(tmp_path, monkeypatch):
    path = _save({"model": DetectionModel(Focus())}, tmp_path / "v5.pt", monkeypatch)
    with pytest.raises(ValueError, match=r"v5\.pt: model\.0\.conv\.conv\.weight is not a tensor"):
        convert_official(path)


def test_a_network_with_folded_norms_or_without_a_layer_is_refused():
    state = _network().state_dict()
    with pytest.raises(ValueError, match=r"model\.0\.conv\.bias is not .* folded batch norms"):
        rename_official({"model.0.conv.bias": torch.zeros(16)} | state)
    for layer, shown in [("0.", "0"), ("4.m.0.cv2.", "4.m.0.cv2"), ("9.cv1.", "9.cv1")]:
        rest = {k: v for k, v in state.items() if not k.startswith(f"model.{layer}")}
        with pytest.raises(ValueError, match=rf"layer model\.{shown} of"):
            rename_official(rest)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        # Seven more bottlenecks, of two convs and norms with five tensors each.
        ("yolov5m", ValueError, r"lacks 70 tensors .*stages\.0\.csp\.blocks\.1\."),
        ("yolov5s", RuntimeError, "size mismatch for stem"),  # as deep, but wider
    ],
)
def test_another_size_is_refused_and_not_half_loaded(name, error, message):
    overlay = {"state_dict": _network().state_dict()}
    with pytest.raises(error, match=message):
        timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)


def test_names_tell_the_project():
    assert is_official(_network().state_dict())
    assert not is_official(timm.create_model("yolov5n").state_dict())
