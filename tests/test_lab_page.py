"""The laboratory's page, in a real browser: its JavaScript is the terms, its drawings move, its verdicts are right."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import goal
from goal.lab import integrability
from goal.lab.read import CannotRead
from goal.lab.webpage import page
from goal.terms import Definition, Product, Term

pytestmark = pytest.mark.usefixtures("registries", "one_thread")

BUILT_IN_T = (goal.T.con(), goal.T.con(margin=0.2), goal.T.nca(), goal.T.cir())
BUILT_IN_P = tuple(goal.P[name]() for name in goal.P)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


# ── the browser ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless browser for the module; where there is none the test is skipped, in CI it fails."""
    found, driver = next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")
    if found is None or driver is None:
        missing = "no Chromium or Chrome" if found is None else "no chromedriver"
        reason = f"{missing} on the PATH (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1400",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens T × P from a file:// URL; afterwards the console must be silent and no network have been asked for."""

    def show(T: Any, P: Any) -> Any:
        path = tmp_path / "page.html"
        path.write_text(page(T, P), encoding="utf-8")
        browser.get(path.as_uri())
        settle(browser)
        return browser

    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    yield show
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if not url.startswith(("file://", "data:", "about:"))] == []


def requests(browser: Any) -> list[str]:
    """The URLs that the page has asked for since the log was last read."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]


def settle(browser: Any) -> None:
    """Waits until what was asked for is drawn."""
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done));")


def pixels(browser: Any, canvas: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).toDataURL()", canvas))


def text(browser: Any, name: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", name))


def slide(browser: Any, slider: int, step: int) -> None:
    """Moves a slider, as a finger does."""
    browser.execute_script(
        "const range = document.getElementById(`slider-${arguments[0]}`); range.value = arguments[1];"
        "range.dispatchEvent(new Event('input', { bubbles: true }));",
        slider,
        step,
    )
    settle(browser)


# ── the formulas ────────────────────────────────────────────────────────────────────────────────────────


def bent() -> tuple[Term, Term]:
    """Terms of a user, with kinks, jumps, functions that stand only where they are finite, names that may mislead."""

    @goal.triplet_weight("bent")
    def bent_t(s_pos: Tensor, s_neg: Tensor, *, shift: float = -0.1, h0: float = 0.3) -> Tensor:
        above = torch.where(s_neg > shift, torch.log(torch.where(s_neg > shift, s_neg - shift, 1.0) + 1), 0.25)
        return above + torch.relu(s_neg - s_pos + h0) + torch.where(s_pos > 0, torch.sqrt(s_pos), 0.5)

    @goal.pair_weight("bent")
    def bent_p(s_pos: Tensor, s_neg: Tensor, *, h0: float = 0.7, τ: float = 2.0) -> tuple[Tensor, Tensor]:
        return (s_pos - h0).abs() / τ, torch.clamp(s_neg, min=-0.5, max=0.5 * h0) ** 2

    return goal.T.bent(), goal.P.bent()


def compare(browser: Any, T: Term, P: Term) -> None:
    """The page's weights and its curl at random points and parameters, against the terms and autograd in float64."""
    sliders = browser.execute_script("return data.sliders")
    product = Product(T, P)
    relative, both = product.statistics, {n for n, v in T.values if P.params.get(n, v) != v}
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        share = torch.rand(len(sliders), generator=draws, dtype=torch.float64)
        values = [
            low * (high / low) ** x if log else low + x * (high - low)
            for (low, high, log), x in zip(
                ((s["low"], s["high"], s["log"]) for s in sliders), share.tolist(), strict=True
            )
        ]
        numbers = dict(zip((s["meaning"] for s in sliders[: len(sliders) - len(relative)]), values, strict=False))
        moved = {}
        for term in (T, P):
            kind = term.definition.registry
            names = {n: f"{n}_{kind}" if n in both else n for n, _ in term.values}
            moved[kind] = term.definition(**{n: numbers.get(names[n], v) for n, v in term.values})
        a, b = (2 * torch.rand(2, 40, generator=draws, dtype=torch.float64) - 1).requires_grad_(True)
        last = values[len(values) - len(relative) :]
        r = {name: torch.full_like(a, v) for name, v in zip(relative, last, strict=True)}
        weights = [w + 0 * (a + b) for w in Product(moved["T"], moved["P"]).weights(a, b, r)]
        t, p_pos, p_neg = weights
        summands = [torch.autograd.grad(w.sum(), s, retain_graph=True)[0] for w, s in ((t * p_neg, a), (t * p_pos, b))]
        points = torch.stack([a, b], 1).tolist()
        for name, true in (("weights", weights), ("curl", summands)):
            run = "const [name, points, p] = arguments; return points.map(([a, b]) => formulas[name](a, b, p))"
            found = torch.tensor(browser.execute_script(run, name, points, values), dtype=torch.float64)
            assert found.isfinite().all()
            expected = torch.stack(true, 1).detach()
            known = expected.isfinite()  # autograd makes a NaN of 0 × ∞ where torch.where leaves an infinite slope out
            assert known.float().mean() > 0.5
            torch.testing.assert_close(found[known], expected[known], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", BUILT_IN_T, ids=repr)
def test_the_formulas_are_the_terms(T: Term, shown: Callable[..., Any]) -> None:
    for P in BUILT_IN_P:
        compare(shown(T, P), T, P)


def test_the_formulas_are_a_users_terms(shown: Callable[..., Any]) -> None:
    T, P = bent()
    compare(shown(T, P), T, P)
    compare(shown(T, "sig-ms"), T, goal.P.sig_ms())


def test_a_comparison_of_parameters_alone_fixes_them(shown: Callable[..., Any]) -> None:
    @goal.triplet_weight("fixed")
    def fixed(s_pos: Tensor, s_neg: Tensor, *, gap: float = 0.3, tau: float = 2.0) -> Tensor:
        return torch.where(s_neg * 0 + gap > 0.25, torch.sigmoid(tau * (s_neg - s_pos)), s_pos)

    browser = shown("fixed", "lin")
    assert [slider["meaning"] for slider in browser.execute_script("return data.sliders")] == ["tau"]
    assert "A term compares gap with a number" in text(browser, "proof")
    compare(browser, goal.T.fixed(), goal.P.lin())


# ── the verdicts ────────────────────────────────────────────────────────────────────────────────────────

VERDICTS = [
    ("nca", "con", True),
    ("nca", "lin", False),
    ("cir", "lin", True),
    (goal.T.con(margin=0.2), "con", True),
    (goal.T.con(margin=0.2), "lin", False),
]


@pytest.mark.parametrize(("T", "P", "a_loss"), VERDICTS)
def test_verdicts(T: Any, P: Any, a_loss: bool, shown: Callable[..., Any]) -> None:
    browser = shown(T, P)
    assert text(browser, "verdict").startswith("A loss's gradient" if a_loss else "The gradient of no loss; ")
    assert text(browser, "found") == f"the gradient of {'a' if a_loss else 'no'} loss"
    assert text(browser, "loss-title") == ("The loss" if a_loss else "The nearest loss")
    truth = integrability(T, P)
    share = browser.execute_script("return latest.share")
    assert share == pytest.approx(truth.rotational_share, rel=1e-3, abs=1e-12)
    loss = torch.tensor(browser.execute_script("return [...latest.loss]"), dtype=torch.float64).view(64, 64)
    true = truth.field.potential
    assert (loss - loss.mean() - true + true.mean()).abs().max() <= 1e-6 * true.abs().max()


def test_a_verdict_follows_the_parameters(shown: Callable[..., Any]) -> None:
    """P± = 1 + k (s⁺, s⁻) on both sides of a hinge at m: along s⁻ = s⁺ − m they agree only where k = 0."""

    @goal.pair_weight("leaning")
    def leaning(s_pos: Tensor, s_neg: Tensor, *, k: float = -0.5) -> tuple[Tensor, Tensor]:
        return 1 + k * s_pos, 1 + k * s_neg

    browser = shown(goal.T.con(margin=0.2), "leaning")
    assert text(browser, "verdict").startswith("The gradient of no loss; ")
    slide(browser, 1, 500)
    assert text(browser, "verdict") == "A loss's gradient."
    assert text(browser, "found") == "the gradient of no loss"  # at the first values
    slide(browser, 1, 501)
    assert text(browser, "verdict").startswith("The gradient of no loss; ")


def test_relative_similarities_are_held(shown: Callable[..., Any]) -> None:
    browser = shown("con", "sig-ms")
    assert text(browser, "verdict").startswith("With R⁺ and R⁻ held fixed: a loss's gradient; over a batch")
    assert text(browser, "found") == "the gradient of no loss"
    labels = browser.execute_script("return [...document.querySelectorAll('#sliders label')].map(l => l.textContent)")
    assert [label.split()[0] for label in labels] == ["α", "β", "λ", "R⁺", "R⁻"]


def test_the_curl_on_a_line(shown: Callable[..., Any]) -> None:
    """con(0.2) × lin jumps on s⁻ = s⁺ − 0.2 by (1 − s⁺ − s⁻) / √2 for each unit of length."""
    browser = shown(goal.T.con(margin=0.2), "lin")
    lines = browser.execute_script("return latest.lines")
    assert len(lines) > 60
    for (a, b), (c, d), strength in lines:
        assert b == pytest.approx(a - 0.2, abs=1e-12)
        assert strength == pytest.approx((2 - a - b - c - d) / 2 / 2**0.5, abs=1e-9)


def test_a_field_that_is_not_finite_is_said_to_be(shown: Callable[..., Any]) -> None:
    @goal.pair_weight("far")
    def far(s_pos: Tensor, s_neg: Tensor, *, reach: float = 3.0) -> tuple[Tensor, Tensor]:
        return 1 - s_pos, torch.log(reach + s_neg)

    browser = shown("con", "far")
    assert text(browser, "verdict") == "A loss's gradient."
    slide(browser, 0, 0)
    assert text(browser, "verdict") == "At these parameters the field is not finite everywhere on the square."


# ── the drawings ────────────────────────────────────────────────────────────────────────────────────────

CANVASES = ("t", "p", "field", "curl", "loss")


def test_a_slider_redraws_and_reset_restores(shown: Callable[..., Any]) -> None:
    browser = shown("nca", "sig")
    before = {name: pixels(browser, name) for name in CANVASES}
    assert len(set(before.values())) == 5
    slide(browser, 0, 300)
    tau = {name: pixels(browser, name) for name in CANVASES}
    assert {name for name in CANVASES if tau[name] != before[name]} == {"t", "field", "curl", "loss"}
    slide(browser, 2, 800)
    assert pixels(browser, "p") != before["p"]
    browser.find_element("id", "reset").click()
    settle(browser)
    assert {name: pixels(browser, name) for name in CANVASES} == before


def test_a_number_may_be_typed(shown: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = shown("nca", "lin")
    box = browser.find_element("css selector", "#sliders [type=number]")
    box.send_keys(Keys.CONTROL, "a", Keys.NULL, "2.5")
    assert browser.execute_script("return settings") == [2.5]
    box.send_keys(Keys.CONTROL, "a", Keys.NULL, "-3", Keys.TAB)  # no τ
    assert browser.execute_script("return settings[0]") > 0
    assert float(str(box.get_attribute("value"))) > 0


def test_a_click_starts_a_trajectory(shown: Callable[..., Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser = shown("cir", "lin")
    before, loss = pixels(browser, "field"), pixels(browser, "loss")
    canvas = browser.find_element("id", "field")
    ActionChains(browser).move_to_element_with_offset(canvas, -40, -30).click().perform()
    browser.execute_script("document.activeElement.blur()")  # and with it the cross that the keys move
    settle(browser)
    assert text(browser, "readout").startswith("Trajectory from (−0.")
    assert pixels(browser, "field") != before
    assert pixels(browser, "loss") != loss
    ends = browser.execute_script(
        "const { points } = trajectory(starts[0], settings, latest.fastest); return [points[0], points.at(-1)]"
    )
    down = [
        browser.execute_script("return softplus(10 * ((1 - arguments[0]) ** 2 + arguments[1] ** 2 - 0.5))", *e)
        for e in ends
    ]
    assert down[1] < down[0]
    browser.find_element("id", "clear").click()
    settle(browser)
    assert browser.execute_script("return starts") == []
    assert pixels(browser, "loss") == loss


def test_keys_start_a_trajectory(shown: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = shown("nca", "con")
    canvas = browser.find_element("id", "field")
    canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert text(browser, "readout").startswith("At s⁺ = 0.25, s⁻ = 0.35: T = ")
    canvas.send_keys(Keys.ENTER)
    settle(browser)
    [(a, b)] = browser.execute_script("return starts")
    assert (a, b) == pytest.approx((0.25, 0.35))
    assert text(browser, "readout").startswith(
        "Trajectory from (0.25, 0.35) to (0.989, −0.389), where the field is all but 0"
    )


def test_trajectories_end(shown: Callable[..., Any]) -> None:
    browser = shown(goal.T.con(margin=0.2), "lin")
    ends = "return [[-0.5, 0.5], [0.9, -0.9]].map(at => trajectory(at, settings, latest.fastest).end)"
    assert browser.execute_script(ends) == ["the field is all but 0"] * 2
    browser = shown("con", "lin")
    run = "const { points, end } = trajectory([-0.5, 0.5], settings, latest.fastest); return [points.at(-1), end]"
    at, end = browser.execute_script(run)
    assert end == "it rests"
    assert at == pytest.approx([1, 0], abs=0.02)


def test_both_colour_schemes_and_a_phone(shown: Callable[..., Any]) -> None:
    browser = shown("nca", "sig-ms")
    drawn = []
    try:
        for scheme in ("light", "dark"):
            features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
            settle(browser)
            drawn.append(pixels(browser, "field"))
        assert drawn[0] != drawn[1]
        phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        settle(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert browser.execute_script("return document.getElementById('t').width") > 500  # sharp
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_control_has_a_name(shown: Callable[..., Any]) -> None:
    browser = shown("nca", "sig-ms")
    for control in browser.find_elements("css selector", "input, button, canvas, summary"):
        assert control.accessible_name.strip(), control.get_attribute("outerHTML")


# ── safety ──────────────────────────────────────────────────────────────────────────────────────────────

EVIL = """</script><script>window.evil = 1</script><img src=x onerror="window.evil = 1">{{data}} & '"`${1}"""


def test_nothing_made_by_users_becomes_markup_or_code(shown: Callable[..., Any]) -> None:
    def t(s_pos: Tensor, s_neg: Tensor, **given: float) -> Tensor:
        return torch.sigmoid(given[EVIL] * (s_neg - s_pos))

    T = Definition("T", EVIL, t, {EVIL: 10.0})()
    browser = shown(T, "lin")
    compare(browser, T, goal.P.lin())
    assert browser.execute_script("return window.evil") is None
    assert browser.find_elements("css selector", "img") == []
    assert text(browser, "terms") == f"{T} × P.lin()"
    assert browser.title == f"{EVIL} × lin: the gradient laboratory"
    assert browser.execute_script("return document.querySelector('#sliders label').textContent") == EVIL
    assert "window.evil" in text(browser, "proof")


def test_the_file_stands_alone() -> None:
    text = page("cir", "sig")
    assert not re.search(r"https?://|//cdn|@import|\burl\(|\bfetch\(|XMLHttpRequest|import\(", text)
    assert len(re.findall(r"<script\b", text)) == 2
    assert "{{" not in text
    assert "/*FORMULAS*/" not in text


def test_what_cannot_be_read_says_so() -> None:
    @goal.triplet_weight("odd")
    def odd(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        return torch.erf(s_neg - s_pos) + 1

    with pytest.raises(CannotRead, match=r"torch\.erf cannot be translated"):
        page("odd", "lin")
    with pytest.raises(ValueError, match="Did you mean 'nca'"):
        page("ncaa", "lin")
