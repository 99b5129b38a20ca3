"""Reads the numbers of a page of `viz.page` again."""

import base64
import json
import re

import numpy as np


def payload(page):
    """The data of a page, found and read as a browser does: up to the first end of a script, as JSON."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)[1]
    return json.loads(text)["examples"]


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def decoded(packed):
    """The numbers of a packed array, one after the other."""
    shape = packed["shape"]
    first, high, length = (
        array(packed[name], dtype) for name, dtype in (("first", "<f4"), ("high", "<f4"), ("length", "<u2"))
    )
    low = array(packed["low"], "<f4") if "low" in packed else np.zeros_like(high)
    codes, place = array(packed["codes"], "u1"), 0
    index, start = (array(packed.get(name, ""), "<u2") for name in ("index", "start"))
    found = np.zeros((len(first), shape[-1]))
    for row in range(len(first)):
        found[row, 0] = first[row]
        for n in range(length[row]):
            column = index[place] if len(index) else start[row] + n
            code = int(codes[place])
            found[row, 1 + column] = np.nan if code == 255 else low[row] + code * (float(high[row]) - low[row]) / 254
            place += 1
    assert place == len(codes)
    return found.reshape(shape)
