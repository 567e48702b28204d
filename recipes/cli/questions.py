"""Records to be asked, for the commands that ask a target; rows that hold no question are told on standard error.

How files become records is infer's (records.py); what is done with the answers is the commands'.
"""

from __future__ import annotations

import sys

from draftsmith.infer.text.records import OnBad, ReadReport, Record, read_records


def read_questions(data: list[str], limit: int | None = None, on_bad: OnBad = "raise") -> list[Record]:
    """Every record with a question, in order; a figure over fewer rows than a file has is not to pass unseen."""
    report = ReadReport()
    records = list(read_records(data, limit=limit, need="questions", on_bad=on_bad, report=report))
    if report.used < report.rows:
        for line in report.lines():
            print(line, file=sys.stderr)
    return records
