"""A page as a test reads it."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest


class Page(HTMLParser):
    """What a page refers to, its tags, and the text of its table cells."""

    def __init__(self, page):
        super().__init__()
        self.sources, self.links, self.cells, self.tags, self._cell = [], [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if "src" in values:
            self.sources.append(values["src"])
        if tag == "a":
            self.links.append(values["href"])
        self._cell = tag == "td"

    def handle_data(self, data):
        if self._cell:
            self.cells.append(data)
        self._cell = False


@pytest.fixture
def parsed():
    """From a page's text to the page."""
    return Page
