"""A light table on zoo models, served to a headless Chromium: `make test-browser`.

Needs playwright (pip) and a Chromium: Debian's package, or the program that CHROMIUM names. Two more variables of the
environment: PATIENCE multiplies all limits on a busy machine; SCREENSHOTS is a folder for pictures of every page, as
in docs/light_table (`make screenshots`), with the learned solvers that SOLVER and FLUX_SOLVER name, if they do.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))

from lighttable.table import LightTable


@pytest.fixture(scope="module")
def table():
    from steps import rewards_of_pictures

    table = LightTable.open("zoo/mini-sd", solver=os.environ.get("SOLVER"), rewards=rewards_of_pictures())
    table.warm_up()
    return table


@pytest.fixture(scope="session")
def tiny_table(tmp_path_factory):
    """Of a random model of 16 x 16 pixels, for what does not depend on pictures."""
    from tiny_teacher import make_tiny_sd

    folder = str(tmp_path_factory.mktemp("model"))
    make_tiny_sd().save_pretrained(folder)
    table = LightTable.open(folder, device="cpu")
    table.warm_up()
    return table


@pytest.fixture(scope="module")
def address(table, tmp_path_factory):
    serve = pytest.importorskip("lighttable.page").serve
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "unset")  # put back afterwards
        served = serve(table, tmp_path_factory.mktemp("app"), prevent_thread_lock=True, quiet=True)
        yield served.local_url
        served.close()


@pytest.fixture(scope="session")
def chromium():
    api = pytest.importorskip("playwright.sync_api")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens the page for a new visitor; keywords are playwright's, such as viewport and color_scheme."""
    from steps import opened

    contexts = []

    def open_page(**settings):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings}))
        return opened(contexts[-1].new_page(), address)

    yield open_page
    for context in contexts:
        context.close()
