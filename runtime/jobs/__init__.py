"""Durable batch runs: every page of every input ends as exactly one record on disk, also after `kill -9`.

    with open_output("pages.jsonl", resume=True) as output:
        totals = run(engine, list_inputs(["scans/", "contract.pdf"]), output)

The journal (`journal.py`) is the truth about what is finished; `writer.py` appends to it, `documents.py`
turns it into JSON, Markdown or text at the end.
"""

from pagemill.jobs.batch import PageReader, Totals, run
from pagemill.jobs.inputs import Inputs, count_pages, list_inputs
from pagemill.jobs.output import FORMATS, Format, Output, infer_format, open_output

__all__ = [
    "FORMATS",
    "Format",
    "Inputs",
    "Output",
    "PageReader",
    "Totals",
    "count_pages",
    "infer_format",
    "list_inputs",
    "open_output",
    "run",
]
