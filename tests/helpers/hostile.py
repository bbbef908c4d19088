"""Files that try to run something, to exhaust memory or time, or that are no checkpoints: none may load.

Whatever could be run would make a marker file, so that it shows.
"""

import gzip
import io
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from official_files import edm_state, write_pickle, write_torch
from torch import nn

P4 = b"\x80\x04"


def text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def called(module: str, name: str, argument: str) -> bytes:
    return named(module, name) + text(argument) + b"\x85R"


def in_snapshot(value: bytes) -> bytes:
    """A pickle of {"ema": value}."""
    return P4 + b"}(" + text("ema") + value + b"u."


DANGEROUS = (
    *(("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("subprocess", "call")),
    *(("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__")),
    *(("__builtin__", "eval"), ("copyreg", "_reconstructor"), ("copyreg", "__newobj__"), ("pickle", "loads")),
    *(("operator", "attrgetter"), ("functools", "partial"), ("importlib", "import_module"), ("runpy", "run_path")),
    *(("torch", "load"), ("torch.hub", "load"), ("torch", "save"), ("torch.serialization", "load")),
    *(("types", "FunctionType"), ("types", "CodeType"), ("codecs", "open"), ("io", "open"), ("_io", "FileIO")),
    *(("numpy", "load"), ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("shutil", "rmtree")),
    *(("webbrowser", "open"), ("socket", "create_connection"), ("ctypes", "CDLL"), ("pty", "spawn")),
    *(("torch_utils.persistence", "import_hook"), ("torch_utils.persistence", "_src_to_module"), ("", "")),
    # Dotted names: an attribute of what is admitted.
    *(("collections", "OrderedDict.fromkeys"), ("torch._utils", "_rebuild_parameter.__globals__")),
    *(("torch.nn.modules.container", "ModuleDict.__init__"), ("_codecs", "encode.__self__"), ("os.path", "os.system")),
    *(("torch_utils.persistence", "sys.modules"), ("numpy", "f2py.os.system"), ("torch\nos", "system\x1b[31m")),
)


def pickles(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Plain pickles, most of them with code that makes `marker`."""
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    for module, name in DANGEROUS:
        argument = code if name in ("eval", "exec") else command
        yield f"call of {module}.{name}", in_snapshot(called(module, name, argument))
        yield f"bare {module}.{name}", in_snapshot(named(module, name))
    container = named("torch.nn.modules.container", "ModuleDict")
    ordered = named("collections", "OrderedDict")
    yield "GLOBAL", P4 + b"cos\nsystem\n" + text(command) + b"\x85R."
    yield "GLOBAL without an end", P4 + b"c" + b"o" * 10_000
    yield "INST", P4 + b"(S'" + command.encode() + b"'\nios\nsystem\n."
    yield "OBJ", P4 + b"(cos\nsystem\n" + text(command) + b"o."
    yield "OBJ of what is admitted", P4 + b"(" + container + b"o."
    yield "NEWOBJ of a function", in_snapshot(ordered + b")\x81")
    yield "NEWOBJ with arguments", in_snapshot(container + text(command) + b"\x85\x81")
    yield "NEWOBJ_EX", in_snapshot(container + b")}\x92")
    yield "REDUCE of a class", in_snapshot(container + b")R")
    yield "REDUCE of text", in_snapshot(text("eval") + text(code) + b"\x85R")
    yield "REDUCE without a tuple", in_snapshot(ordered + b"]R")
    yield "too many arguments", in_snapshot(ordered + b"(K\x01K\x02K\x03tR")
    yield "too few arguments", in_snapshot(named("torch._utils", "_rebuild_tensor_v2") + b")R")
    for number, opcode in (("1", b"\x82\x01"), ("2", b"\x83\x01\x00"), ("4", b"\x84\x01\x00\x00\x00")):
        yield f"EXT{number}", P4 + opcode + b")R."
    setstate = b"}(" + text("__setstate__") + ordered + b"u"
    yield "BUILD with a method", in_snapshot(container + b")\x81" + setstate + b"b")
    yield "BUILD with slots", in_snapshot(container + b")\x81N" + setstate + b"\x86b")
    yield "BUILD twice", in_snapshot(container + b")\x81" + setstate + b"b" + setstate + b"b")
    yield "BUILD of a dictionary", in_snapshot(b"}" + setstate + b"b")
    yield "BUILD of a function", in_snapshot(ordered + setstate + b"b")
    yield "BUILD of a class", in_snapshot(container + setstate + b"b")
    yield "BUILD of an EasyDict", in_snapshot(named("dnnlib.util", "EasyDict") + b")\x81" + setstate + b"b")
    yield "bytes in another encoding", in_snapshot(named("_codecs", "encode") + text("a") + text("rot13") + b"\x86R")
    yield "NumPy objects", in_snapshot(named("numpy", "dtype") + text("O8") + b"\x89\x88\x87R")
    yield "NumPy records", in_snapshot(named("numpy", "dtype") + text("V8") + b"\x89\x88\x87R")
    yield "a set of lists", in_snapshot(named("builtins", "set") + b"](]]e\x85R")
    yield "a set of tuples", in_snapshot(b"\x8f()\x90")
    yield "persistent id", P4 + text("storage") + b"Q."
    yield "persistent id as text", P4 + b"Pstorage\n."
    yield "out-of-band buffer", b"\x80\x05\x97."
    for name, width in (("BINBYTES8", b"\x8e"), ("BINUNICODE8", b"\x8d"), ("BYTEARRAY8", b"\x96"), ("FRAME", b"\x95")):
        for size in (1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
            yield f"{name} of {size}", P4 + width + struct.pack("<Q", size) + b"abc."
    yield "BINBYTES of 4 GB", P4 + b"B\xff\xff\xff\xffabc."
    yield "BINSTRING of negative length", P4 + b"T\xff\xff\xff\xffabc."
    yield "LONG1 of 255 bytes", P4 + b"\x8a\xff" + b"\x7f" * 255 + b"."
    yield "LONG4 of 2 GB", P4 + b"\x8b\xff\xff\xff\x7f" + b"\x01."
    yield "LONG4 of negative length", P4 + b"\x8b\xff\xff\xff\xff."
    yield "LONG_BINPUT at 2^31", P4 + b"}r\x00\x00\x00\x80."
    yield "LONG_BINPUT at 2^32 - 1", P4 + b"}r\xff\xff\xff\xff."
    yield "PUT at 10^30", P4 + b"}p" + b"9" * 30 + b"\n."
    yield "INT of 10^6 digits", P4 + b"I" + b"9" * 1_000_000 + b"\n."
    yield "one number stored twice", P4 + b"}q\x00}q\x00."
    yield "BINGET of nothing", P4 + b"h\x07."
    for kind, opcode in (("lists", b"]"), ("dictionaries", b"}"), ("marks", b"("), ("nothing", b"N")):
        yield f"two million {kind}", P4 + opcode * 2_000_000 + b"."
    yield "a million texts", P4 + b"\x8c\x01a" * 1_100_000 + b"."
    yield "10^5 tuples inside each other", in_snapshot(b")" + b"\x85" * 100_000)
    yield "10^5 lists inside each other", in_snapshot(b"]" * 100_001 + b"a" * 100_000)
    yield "10^5 dictionaries inside each other", in_snapshot((b"}" + text("a")) * 100_000 + b"}" + b"s" * 100_000)
    yield "10^5 open lists", in_snapshot(b"](" * 100_000 + b"e" * 100_000)
    tuples = b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(90))
    yield "2^90 tuples", in_snapshot(b")" + tuples)
    yield "a key of 2^90 tuples", in_snapshot(b"})" + tuples + b"Ns")
    yield "a key of numbers", in_snapshot(b"}G\x00\x00\x00\x00\x00\x00\x00\x00Ns")
    yield "a key beyond 32 bits", in_snapshot(b"}\x8a\x08" + b"\x01" * 7 + b"\x7fNs")
    yield "one key twice", in_snapshot(b"}(" + (text("a") + b"N") * 2 + b"u")
    yield "a dictionary in itself", P4 + b"}q\x00(" + text("ema") + b"h\x00u."
    yield "a list in itself", P4 + b"]q\x00h\x00a."
    yield "nothing on the stack", P4 + b"R."
    yield "nothing at all", P4 + b"."
    yield "no end", P4 + b"}"
    yield "two objects", P4 + b"}}."
    yield "an open mark", P4 + b"(}."
    yield "more after the end", P4 + b"}.}."
    for version in (6, 255):
        yield f"protocol {version}", b"\x80" + bytes([version]) + b"}."
    yield "a list", pickle.dumps([1, 2])
    yield "text with escapes", pickle.dumps({"\x1b[2J\n" * 50: "\n" * 1000})
    yield "a state dict", pickle.dumps({"model.weight": 1.0})
    yield "NumPy's pickle", pickle.dumps({"ema": memoryview(b"x").tobytes()}) + b"\x00"


# -- containers -------------------------------------------------------------------------------------------------------


def rewritten(
    archive: bytes, *, method: int = zipfile.ZIP_STORED, rename: dict[str, str] | None = None, **replaced: bytes
) -> bytes:
    """A zip with members replaced, by the end of their names; empty content leaves one out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w", method) as new:
        for info in old.infolist():
            key = info.filename.partition("/")[2].replace("/", "_").replace(".", "_")
            content = replaced.get(key, old.read(info))
            if content:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a name twice
                    new.writestr((rename or {}).get(key, info.filename), content)
    return out.getvalue()


def storage_pickle(*parts: bytes) -> bytes:
    """{"ema": a tensor whose storage is described by these parts}."""
    described = b"(" + b"".join(parts) + b"tQ"
    arguments = b"(" + described + b"K\x00K\x04\x85K\x01\x85\x89" + named("collections", "OrderedDict") + b")RtR"
    return b"\x80\x02}(" + text("ema") + named("torch._utils", "_rebuild_tensor_v2") + arguments + b"u."


def containers(folder: Path, net: nn.Module) -> Iterator[tuple[str, bytes]]:
    """Zips and files of older torch.save, each with something wrong."""
    good = write_torch(folder / "good.pt", edm_state(net)).read_bytes()
    float32, kind = named("torch", "FloatStorage"), text("storage")
    place = text("cpu")
    storages = {
        "four parts": (kind, float32, text("0"), place),
        "six parts": (kind, float32, text("0"), place, b"K\x04", b"N"),
        "another kind": (text("module"), float32, text("0"), place, b"K\x04"),
        "no class": (kind, text("FloatStorage"), text("0"), place, b"K\x04"),
        "a number as key": (kind, float32, b"K\x00", place, b"K\x04"),
        "another key": (kind, float32, text("none"), place, b"K\x04"),
        "a key that climbs": (kind, float32, text("../../data.pkl"), place, b"K\x04"),
        "a negative count": (kind, float32, text("0"), place, b"J\xff\xff\xff\xff"),
        "a lie of its count": (kind, float32, text("0"), place, b"J\xff\xff\xff\x7f"),
        "2^100 elements": (kind, float32, text("0"), place, b"\x8a\x0d" + b"\x01" * 13),
    }
    for name, parts in storages.items():
        yield f"storage of {name}", rewritten(good, data_pkl=storage_pickle(*parts))
    yield "a zip of pickles that run", rewritten(good, data_pkl=P4 + called("os", "system", "true") + b".")
    yield "compressed", rewritten(good, method=zipfile.ZIP_DEFLATED)
    yield "a bomb", rewritten(good, method=zipfile.ZIP_DEFLATED, data_pkl=b"]" * 50_000_000)
    yield "no data.pkl", rewritten(good, data_pkl=b"")
    yield "no storage", rewritten(good, data_0=b"")
    yield "a short storage", rewritten(good, data_0=b"1234")
    yield "big-endian", rewritten(good, byteorder=b"big")
    yield "two data.pkl", rewritten(good, rename={"version": "other/data.pkl"})
    yield "members twice", rewritten(good, rename={"version": "good/data.pkl"})
    yield "a name that climbs", rewritten(good, rename={"version": "../../version"})
    yield "an absolute name", rewritten(good, rename={"version": "/etc/version"})
    first = good.index(b"PK\x01\x02")
    encrypted = bytearray(good)
    encrypted[first + 8] |= 1
    yield "encrypted", bytes(encrypted)
    crc = bytearray(good)
    crc[first + 16] ^= 1
    yield "another checksum", bytes(crc)
    moved = bytearray(good)
    moved[first + 42] ^= 0x40
    yield "a member elsewhere", bytes(moved)
    end = good.rindex(b"PK\x05\x06")
    large = bytearray(good)
    struct.pack_into("<Q", large, good.rindex(b"PK\x06\x06") + 40, 1 << 40)
    yield "a huge table of contents", bytes(large)
    yield "many members", good[:end] + good[first:end] * 3 + good[end:]
    for length in (4, 100, first, end, len(good) - 1):
        yield f"a zip of {length} bytes", good[:length]
    old = write_torch(folder / "old.pt", edm_state(net), older_format=True).read_bytes()
    yield "big-endian, older format", old.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    yield "another version, older format", old.replace(b"M\xe9\x03.", b"M\xea\x03.", 1)
    for length in (14, 20, 200, len(old) // 2, len(old) - 1):
        yield f"older format, {length} bytes", old[:length]
    yield "older format and more", old + b"more"
    start = old[: old.index(b"uu.") + 3]
    laughs = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(90))
    yield "a list of storages of 2^90 tuples", start + b"\x80\x02}.\x80\x02](" + laughs + b"e."
    yield "an older class that is a function", old.replace(b"ModuleDict\n", b"Sequential\n")


def other_files() -> Iterator[tuple[str, bytes]]:
    """What is no checkpoint at all."""
    yield "empty", b""
    yield "text", b"import os; os.system('true')\n"
    yield "JSON", b'{"format": "ipfm-network"}'
    yield "safetensors", struct.pack("<Q", 2) + b"{}"
    header = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    yield "PNG", png
    yield "gzip", gzip.compress(pickle.dumps({}))
    yield "zeros", bytes(1000)
    images = io.BytesIO()
    with zipfile.ZipFile(images, "w") as archive:
        archive.writestr("00000/img00000000.png", png)
    yield "a zip of images", images.getvalue()
    yield "a tar", b"sys_info\x00".ljust(512, b"\x00")
    yield "a pickle of protocol 0", pickle.dumps({"ema": 1}, protocol=0)
    yield "a byte 0x80", b"\x80"


def write_corpus(folder: Path, net: nn.Module, records: Iterator[tuple[str, object]]) -> dict[str, Path]:
    """Every hostile file by what it is; `records` are objects to be pickled as whole checkpoints."""
    folder.mkdir()
    marker = folder / "marker"
    files: dict[str, Path] = {}
    contents = [*pickles(marker), *containers(folder, net), *other_files()]
    for number, (name, content) in enumerate(contents):
        files[name] = folder / f"{number:03}.pkl"
        files[name].write_bytes(content)
    for number, (name, root) in enumerate(records):
        files[name] = write_pickle(folder / f"record-{number:03}.pkl", root)
    assert len(files) == len(contents) + number + 1, "two files of one name"
    return files
