"""Writes everything that the finished runs say: docs/study.*, and the tables of other pages.

python -m tools.study.pages
"""

from tools.study import beyond, report, rivals, sparse


def main() -> None:
    report.write_report(report.OUT)
    for page in (rivals, beyond, sparse):
        page.write_page(report.OUT)


if __name__ == "__main__":
    main()
