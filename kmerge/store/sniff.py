"""What a file is, judged by its first bytes, for messages about files that hold no model."""

import pickletools
import struct

from kmerge.store.rawio import Descriptor, Part

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")

_EXPECTED = "kmerge reads .keras, .h5 and .weights.h5 files."
_MAGIC = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the model itself: run 'git lfs pull' to get it."),
    (b"version https://hawser", "is a Git LFS pointer, not the model itself: run 'git lfs pull' to get it."),
    (b"\x1f\x8b", f"is gzip-compressed: unpack it first (gunzip, or tar -xzf). {_EXPECTED}"),
    (b"BZh", f"is bzip2-compressed: unpack it first. {_EXPECTED}"),
    (b"\xfd7zXZ\0", f"is xz-compressed: unpack it first. {_EXPECTED}"),
    (b"\x28\xb5\x2f\xfd", f"is zstd-compressed: unpack it first. {_EXPECTED}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: unpack it first. {_EXPECTED}"),
    (b"Rar!\x1a\x07", f"is a RAR archive: unpack it first. {_EXPECTED}"),
    (b"\x93NUMPY", f"is a NumPy array (.npy), not a model. {_EXPECTED}"),
    (b"GGUF", f"is a GGUF file of a language model, not a Keras model. {_EXPECTED}"),
    (b"\x89PNG", f"is a picture (PNG), not a model. {_EXPECTED}"),
    (b"\xff\xd8\xff", f"is a picture (JPEG), not a model. {_EXPECTED}"),
    (b"%PDF", f"is a PDF document, not a model. {_EXPECTED}"),
    (b"CDF\x01", f"is a netCDF data file, not a model. {_EXPECTED}"),
    (b"\x0e\x03\x13\x01", f"is an HDF4 file, which Keras never wrote. {_EXPECTED}"),
)
_RESAVE = "save the model with Keras (model.save('model.keras')) and give that file."


def hdf5_start(file: Descriptor | Part) -> int | None:
    """Where the HDF5 signature stands: at 0, or behind a user block of 512, 1024, 2048, … bytes; None if nowhere."""
    if file.read(0, 4) in ZIP_SIGNATURES:  # a member may stand just where HDF5 looks for a file behind a user block
        return None
    offset = 0
    while offset + 8 <= file.size:
        if file.read(offset, 8) == HDF5_SIGNATURE:
            return offset
        offset = offset * 2 or 512
    return None


def what_else(file: Descriptor | Part) -> str:
    """Say what a file is that holds no model, and how to go on: the rest of a sentence that starts with its name."""
    head = file.read(0, 4096)
    if not file.size:
        return "is empty (0 bytes): download or copy it again."
    if not head.strip(b"\0"):
        return "starts with nothing but zeros, like an unfinished download: get it again."
    if HDF5_SIGNATURE.startswith(head[:8]):
        return "is a truncated HDF5 file: it ends within its first bytes. Download or copy it again."
    if head.startswith(HDF5_SIGNATURE):
        return "is an HDF5 file; a zip was expected."
    for magic, sentence in _MAGIC:
        if head.startswith(magic):
            return sentence
    if head[:4] in ZIP_SIGNATURES:
        return "is a zip archive; an HDF5 file was expected."
    if head[257:262] == b"ustar":
        return f"is a tar archive: unpack it first. {_EXPECTED}"
    if len(head) > 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= max(file.size, 100_000_000):
        return (
            f"is a safetensors file, which holds weights of PyTorch or JAX but no Keras model: load "
            f"it in Keras, then {_RESAVE}"
        )
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model, which is final and cannot be merged: {_RESAVE}"
    if _looks_like_pickle(head):
        return (
            f"is a Python pickle (PyTorch, joblib or scikit-learn?), which kmerge never opens since "
            f"it can run code: {_RESAVE}"
        )
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42"):
        return f"looks like an ONNX model, which cannot be merged: {_RESAVE}"
    if b"saved_model" in head or b"\x12\x05serve" in head or (b"tensorflow" in head.lower() and not _is_text(head)):
        return f"looks like part of a TensorFlow SavedModel or checkpoint: {_RESAVE}"
    if _is_text(head):
        start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if start.startswith((b"<!doctype html", b"<html", b"<head")):
            return "is a web page, not a model: the download led to a page. Get the file behind it."
        if start.startswith(b"<"):
            return f"is XML or HTML text, not a model. {_EXPECTED}"
        if start.startswith((b"{", b"[")):
            return f"is JSON text, not weights. {_EXPECTED}"
        return f"is a text file, not a model. {_EXPECTED}"
    return f"is of no format that kmerge knows. {_EXPECTED}"


def _looks_like_pickle(head: bytes) -> bool:
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head[:1] not in (b"(", b"c", b"]", b"}") or b"\n" not in head:
        return False
    try:  # protocol 0 is text: three opcodes that make sense are enough
        for count, (_, _, _) in enumerate(pickletools.genops(head), 1):
            if count >= 6:
                return b"cnumpy" in head or b"c__" in head or b"ccopy_reg" in head or b"csklearn" in head
    except Exception:  # pickletools raises whatever it meets
        return False
    return False


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # a character may be cut at the end
            try:
                head.decode("latin-1")
            except UnicodeDecodeError:
                return False
            printable = sum(byte >= 32 or byte in b"\t\r\n" for byte in head)
            return printable == len(head) and sum(byte >= 128 for byte in head) < len(head) // 10
    return sum(byte < 32 and byte not in b"\t\r\n\f" for byte in head) <= len(head) // 100
