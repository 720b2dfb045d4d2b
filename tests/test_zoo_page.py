"""The page as text, and in a real browser: nothing of it is pretended."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser

from mocohub.cli import main
from mocohub.hub.zoo import ZOO
from mocohub.hub.zoo_page import write_zoo_page

NAMES = list(ZOO)
ORDER = "[...document.querySelectorAll('.zoo > tbody')].filter(m => !m.hidden).map(m => m.dataset.name)"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo_page(tmp_path_factory.mktemp("zoo") / "zoo.html")


def test_a_folder_gets_an_index_and_a_file_its_name(tmp_path, capsys):
    assert write_zoo_page(tmp_path / "site") == tmp_path / "site" / "index.html"
    assert main(["zoo", "--html", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    same = (tmp_path / "site" / "index.html").read_bytes()
    assert (tmp_path / "page.html").read_bytes() == same


def test_an_older_page_is_replaced_and_readable_by_the_web_server(tmp_path):
    (tmp_path / "index.html").write_text("old")
    assert "MoCo model zoo" in write_zoo_page(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "new").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "new"}
    assert (tmp_path / "index.html").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_every_fact_of_the_zoo_is_on_the_page(html):
    text = html.read_text(encoding="utf-8")
    for name, model in ZOO.items():
        entry = text[text.index(f'<tbody data-name="{name}"') :]
        entry = entry[: entry.index("</tbody>")].replace("&#39;", "'").replace("&#34;", '"')
        facts = [model.source, model.cost, model.license or "no weights", f"{model.num_parameters:,}"]
        facts += [model.weights_url or "", model.weights_md5 or "", str(model.linear_top1_pct or "")]
        facts += [text for row in model.published for text in (row.task, row.value, row.source)]
        assert [fact for fact in facts if fact not in entry] == []


def test_the_page_refers_to_nothing_outside_but_the_authors_files(html):
    text = html.read_text(encoding="utf-8")
    urls = set(re.findall(r"(?:src|href|action|url\()\W*((?:https?:)?//[^\"') ]+)", text))
    assert urls == {model.weights_url for model in ZOO.values() if model.weights_url}
    assert "default-src 'none'" in text


def test_text_of_the_zoo_cannot_become_markup(tmp_path, monkeypatch):
    evil = dataclasses.replace(ZOO["moco_r50_in1m"], source="<script>alert(1)</script>", data='"><img src=x>')
    monkeypatch.setitem(ZOO, "moco_r50_in1m", evil)
    text = write_zoo_page(tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text
    assert "&lt;script&gt;alert" in text


# --- in the browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, html: Path) -> Iterator[Browser]:
    """The page, opened anew; afterwards: it asked for nothing else, and nothing went wrong in it."""
    browser.requests.clear()
    browser.open(html.as_uri())
    yield browser
    assert browser.run("document.readyState") == "complete"  # so that every event before has arrived
    assert {url for url in browser.requests if not url.startswith("data:")} == {html.as_uri()}
    assert browser.errors == []


def fill(page: Browser, words: str) -> list[str]:
    page.run("document.getElementById('search').value = ''")
    page.click("#search")
    page.type(words)
    return page.run(ORDER)


def choose(page: Browser, select: str, value: str) -> list[str]:
    page.run(
        f"(() => {{ const e = document.getElementById('{select}'); e.value = '{value}';"
        "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )
    return page.run(ORDER)


def test_the_table_shows_all_models_in_the_order_of_the_zoo(page):
    assert page.run(ORDER) == NAMES
    assert page.run("document.getElementById('count').textContent") == f"{len(NAMES)} of {len(NAMES)} models"


def test_typing_filters_by_every_word_in_any_order_and_case(page):
    assert fill(page, "mocov2") == ["mocov2_r50_in1m", "mocov2_r50_in1m_800ep"]
    assert fill(page, "800 V2") == ["mocov2_r50_in1m_800ep"]
    assert fill(page, "instagram") == ["moco_r50_ig1b"]
    assert fill(page, "cc-by-nc") == [name for name in NAMES if ZOO[name].weights == "authors"]
    assert page.run("document.getElementById('count').textContent") == f"3 of {len(NAMES)} models"


def test_nothing_found_is_said_and_reset_brings_all_back(page):
    assert fill(page, "vision transformer") == []
    assert "No model is like that" in page.run("document.body.innerText")
    page.click("[data-sort=params] button")
    page.click("#reset")
    assert page.run(ORDER) == NAMES
    assert "No model is like that" not in page.run("document.body.innerText")


def test_backbone_and_weights_filter_together(page):
    assert choose(page, "backbone", "r50") == [n for n in NAMES if ZOO[n].backbone == "r50"]
    assert choose(page, "weights", "none") == ["moco_r50_ig1b"]
    assert choose(page, "backbone", "") == [n for n in NAMES if ZOO[n].weights == "none"]
    assert choose(page, "weights", "bundled") == ["moco_tiny_cifar10"]


def test_sorting_puts_the_best_first_then_the_worst_and_the_unknown_always_last(page):
    known = [name for name in NAMES if ZOO[name].linear_top1_pct is not None]
    unknown = [name for name in NAMES if ZOO[name].linear_top1_pct is None]
    page.click("[data-sort=top1] button")
    best = sorted(known, key=lambda name: -ZOO[name].linear_top1_pct)
    assert page.run(ORDER) == best + unknown
    assert page.run("document.querySelector('[data-sort=top1]').ariaSort") == "descending"
    page.click("[data-sort=top1] button")
    assert page.run(ORDER) == best[::-1] + unknown
    page.click("[data-sort=name] button")
    assert page.run(ORDER) == sorted(NAMES)
    assert page.run("document.querySelectorAll('[aria-sort]').length") == 1


def test_parameters_are_sorted_as_numbers(page):
    page.click("[data-sort=params] button")
    sizes = [ZOO[name].num_parameters for name in page.run(ORDER)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_buttons_copy_the_commands_of_their_model(page, name):
    model, copied = ZOO[name], {}
    row = f"[data-name={name}] .main .copy"
    page.run("void (window.setTimeout = () => 0)")  # "copied" stays for as long as it takes to look
    for i, label in enumerate(page.run(f"[...document.querySelectorAll('{row}')].map(b => b.textContent)")):
        page.click(f"{row}:nth-of-type({i + 1})")
        copied[label] = page.run("navigator.clipboard.readText()")
        assert page.run("document.activeElement.textContent") == "copied"
        assert page.run("document.getElementById('said').textContent") == f"Copied: {copied[label]}"
    expected = {"load": f'mocohub.load("{name}")'}
    if model.weights == "authors":
        expected["download"] = f"curl --remote-name {model.weights_url}"
    if model.weights == "none":
        expected = {"train": f"mocohub pretrain {name} --data IMAGES --out RUN"}
    assert copied == expected


def test_copying_works_where_the_browser_gives_no_clipboard(page):
    page.run("navigator.clipboard.writeText('before')")
    page.run("void (navigator.clipboard.writeText = () => Promise.reject(new Error('denied')))")
    page.click("[data-name=moco_tiny_cifar10] .copy")
    assert page.run("navigator.clipboard.readText()") == 'mocohub.load("moco_tiny_cifar10")'


def test_everything_can_be_done_with_the_keyboard(page):
    page.run("document.getElementById('search').focus()")
    seen = []
    for _ in range(16):
        page.press("Tab")
        seen.append(page.run("document.activeElement.id || document.activeElement.textContent"))
    heads = ["Model", "Backbone", "Params, M", "Linear top-1, %", "VOC AP50", "Weights", "Licence"]
    first = ["moco_r50_in1m", "load", "download"]
    assert seen[:13] == ["backbone", "weights", "reset", *heads, *first]
    page.run("document.querySelector('[data-name=moco_r50_in1m] .name button').focus()")
    page.press("Enter")
    assert "LVIS v0.5 masks" in page.run("document.querySelector('#more-moco_r50_in1m').innerText")
    page.press("Tab")
    page.press(" ")
    assert page.run("navigator.clipboard.readText()") == 'mocohub.load("moco_r50_in1m")'
    page.run("document.querySelector('[data-sort=name] button').focus()")
    page.press("Enter")
    assert page.run(ORDER) == sorted(NAMES)


def test_details_open_and_close_and_stay_with_their_model(page):
    more = "document.querySelector('#more-moco_tiny_cifar10')"
    assert page.run(f"{more}.checkVisibility()") is False
    page.click("[data-name=moco_tiny_cifar10] .name button")
    assert "63.82" in page.run(f"{more}.innerText")
    page.click("[data-sort=params] button")
    assert page.run(f"{more}.checkVisibility() && {more}.parentElement.dataset.name") == "moco_tiny_cifar10"
    page.click("[data-name=moco_tiny_cifar10] .name button")
    assert page.run(f"{more}.checkVisibility()") is False


@pytest.mark.parametrize("width", [320, 390, 768, 900, 1280, 1920])
def test_nothing_is_wider_than_the_window(page, html, width):
    page.open(f"{html.as_uri()}", width=width)
    page.run("document.querySelectorAll('.name button').forEach(button => button.click())")
    assert page.run("document.documentElement.scrollWidth") <= width


def test_on_a_phone_models_are_sorted_by_a_list(page, html):
    page.open(html.as_uri(), width=390)
    assert page.run("document.querySelector('.zoo thead').checkVisibility()") is False
    assert page.run("document.getElementById('order').checkVisibility()") is True
    assert choose(page, "order", "top1")[0] == "mocov2_r50_in1m_800ep"
    assert choose(page, "order", "") == NAMES


def contrast(page: Browser, selector: str) -> float:
    """WCAG 2's ratio between an element's colour and the page's."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = "getComputedStyle(document.querySelector('{}')).{}"
    text, back = (
        luminance(page.run(style.format(*pair)))
        for pair in [(selector, "color"), ("body", "backgroundColor")]
    )
    return (max(text, back) + 0.05) / (min(text, back) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_systems_colours_and_can_be_read_in_both(page, scheme):
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 25, 31)"}[scheme]
    for selector in (
        "h1",
        ".muted",
        ".name button",
        ".name small",
        ".state.authors",
        ".state.none",
        "select",
    ):
        assert contrast(page, selector) >= 4.5, selector


def test_the_button_changes_the_colours_and_the_choice_is_kept(page, html):
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    background = "getComputedStyle(document.body).backgroundColor"
    page.open(html.as_uri())
    page.click("#theme")
    assert page.run(background) == "rgb(20, 25, 31)"
    page.open(html.as_uri())
    assert page.run(background) == "rgb(20, 25, 31)"
    page.click("#theme")
    assert page.run(background) == "rgb(255, 255, 255)"
    page.run("localStorage.clear()")
