"""The page of a run: one file for a browser, which loads and runs nothing."""

from fedveil.report.page.page import page, write_page

__all__ = ["page", "write_page"]
