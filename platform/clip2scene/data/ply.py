"""The vertices of a PLY file (Turk 1994), ScanNet's format of meshes and their labels.

Only the vertex element is read; faces and whatever else follows are skipped. Bytes in, numpy out: no I/O here.

Legend: N vertices, I values per point.
"""

from __future__ import annotations

import numpy as np

from clip2scene.errors import DataError

_BYTE_ORDER = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "="}
_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
_LUMINANCE = np.array([0.299, 0.587, 0.114]) / 255
"""Weights of red, green and blue (ITU-R BT.601), for 8-bit colours."""


def points(data: bytes, source: str) -> np.ndarray:
    """A mesh's vertices as a cloud. Never pass a labels file: it has colours too, but they *are* the labels.

    Args:
        data: the PLY file; its vertices have x, y, z (metres) and 8-bit red, green, blue.
        source: the file's name, for the message.

    Returns:
        (N, 7) float32: x, y, z and, in [0, 1], the luminance of the vertex's colour and its red, green and blue.

    Raises:
        DataError: the file is damaged, truncated, without vertices or without one of these properties, or a vertex is
            not finite.
    """
    vertices_N = _vertices(data, source, ("x", "y", "z", "red", "green", "blue"))
    for name in ("red", "green", "blue"):
        if vertices_N.dtype[name] != np.uint8:
            raise DataError(f"{source}: property {name} is {vertices_N.dtype[name]}; 8-bit colours (uchar) are needed")
    rgb_N3 = np.stack([vertices_N[name] for name in ("red", "green", "blue")], axis=1)
    columns = [*(vertices_N[name] for name in ("x", "y", "z")), np.minimum(rgb_N3 @ _LUMINANCE, 1), *(rgb_N3.T / 255)]
    points_NI = np.stack(columns, axis=1, dtype=np.float32, casting="same_kind")
    if not np.isfinite(points_NI).all():
        row = int(np.flatnonzero(~np.isfinite(points_NI).all(axis=1))[0])
        raise DataError(f"{source}: point {row} of {len(points_NI)} is not finite ({points_NI[row].tolist()})")
    return points_NI


def labels(data: bytes, source: str) -> np.ndarray:
    """The property ``label`` of the vertices (ScanNet: nyu40 ids).

    Returns:
        (N,) int64, from 0.

    Raises:
        DataError: the file is damaged, truncated, without vertices or without labels, or a label is negative or not a
            whole number.
    """
    labels_N = _vertices(data, source, ("label",))["label"]
    wrong_N = (labels_N < 0) | (labels_N != np.floor(labels_N))
    if wrong_N.any():
        raise DataError(f"{source}: label {labels_N[wrong_N][0]} is not a class id; allowed: whole numbers from 0")
    return labels_N.astype(np.int64)


def _vertices(data: bytes, source: str, needed: tuple[str, ...]) -> np.ndarray:
    """(N,) structured array of the vertex element, with one field per property."""
    if data[:4].rstrip() != b"ply":
        raise DataError(f"{source}: not a PLY file (its first line is not 'ply')")
    marker = data.find(b"end_header")
    start = data.find(b"\n", marker) + 1
    if marker < 0 or start == 0:
        raise DataError(f"{source}: truncated PLY file: its header has no end_header")
    lines = [line.split() for line in data[:marker].decode("ascii", errors="replace").splitlines()[1:]]
    lines = [words for words in lines if words and words[0] not in ("comment", "obj_info")]
    if not lines or lines[0][0] != "format" or len(lines[0]) != 3 or lines[0][1] not in _BYTE_ORDER:
        raise DataError(f"{source}: PLY header without a known format; allowed: {', '.join(_BYTE_ORDER)}")
    count, row = _layout(lines[1:], _BYTE_ORDER[lines[0][1]], source)
    missing = [name for name in needed if name not in (row.names or ())]
    if missing:
        raise DataError(
            f"{source}: its vertices have no property {', '.join(missing)} ({', '.join(needed)} are needed)"
        )
    if lines[0][1] == "ascii":
        return _ascii(data[start:], count, row, source)
    if len(data) - start < count * row.itemsize:
        complete = (len(data) - start) // row.itemsize
        raise DataError(f"{source}: truncated PLY file: {complete} of {count} vertices are there")
    return np.frombuffer(data, dtype=row, count=count, offset=start)


def _layout(lines: list[list[str]], order: str, source: str) -> tuple[int, np.dtype]:
    """Number of vertices, and the type of a vertex."""
    if not lines or lines[0][:2] != ["element", "vertex"] or len(lines[0]) != 3 or not lines[0][2].isdecimal():
        raise DataError(f"{source}: PLY header, first element: not 'element vertex COUNT'")
    fields: list[tuple[str, str]] = []
    for words in lines[1:]:
        if words[0] == "element":
            break
        if len(words) != 3 or words[0] != "property" or words[1] not in _TYPES:
            raise DataError(f"{source}: PLY header: {' '.join(words)!r} is not a scalar property of a vertex")
        if words[2] in dict(fields):
            raise DataError(f"{source}: PLY header: property {words[2]!r} occurs twice")
        fields.append((words[2], order + _TYPES[words[1]]))
    count = int(lines[0][2])
    if count == 0 or not fields:
        raise DataError(f"{source}: PLY file without vertices; at least one is needed")
    return count, np.dtype(fields)


def _ascii(text: bytes, count: int, row: np.dtype, source: str) -> np.ndarray:
    names = row.names or ()
    words = text.split(maxsplit=count * len(names))[: count * len(names)]
    if len(words) < count * len(names):
        raise DataError(f"{source}: truncated PLY file: {len(words) // len(names)} of {count} vertices are there")
    vertices_N = np.empty(count, dtype=row)
    try:
        numbers = np.array(words, dtype=np.float64).reshape(count, len(names))
    except ValueError as error:
        raise DataError(f"{source}: PLY file with a vertex that is not numbers ({error})") from error
    for column, name in enumerate(names):
        kind = row[name]
        if kind.kind in "iu":
            limits, values = np.iinfo(kind), numbers[:, column]
            if not ((values >= limits.min) & (values <= limits.max) & (values == np.floor(values))).all():
                raise DataError(f"{source}: property {name} has values that are not {kind}")
        vertices_N[name] = numbers[:, column]
    return vertices_N
