"""Prints the rise of resident memory during one call: `python -m benchmarks.resident CONTENDER CASE SETTING`."""

import json
import sys

from benchmarks.cases import Setting
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import peak_while

if __name__ == "__main__":
    contender, case, setting = sys.argv[1:]
    print(peak_while(CONTENDERS[contender](case, Setting(**json.loads(setting))).run))
