"""`lory serve` as a process, and its page in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading

import openai
import pytest

from tests.support.served import serving
from tests.support.tiny import (
    assert_one_line_error,
    verb,
    verb_command,
    verb_environment,
    write_prepared,
    write_recipe,
)
from tests.verbs.test_api import TEXT, make_model

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data, recipe = write_prepared(root / "data"), write_recipe(root)
    result = verb("train", f"--config={recipe}", f"--data={data}", f"--workdir={root / 'run'}")
    assert result.returncode == 0, result.stderr
    return root / "run"


def test_a_process_serves_all_domains_and_stops_gracefully(run):
    process = subprocess.Popen(
        verb_command("serve", f"--workdir={run}", "--port=0", "--batch_size=2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=verb_environment(),
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"serving (.*) on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line + process.stderr.read()
        assert found[1] == "lory, lory:ones, lory:threes"
        client = openai.OpenAI(base_url=f"{found[2]}/v1", api_key="none", max_retries=0)
        fields = dict(temperature=2, seed=1, max_tokens=20)
        stream = client.completions.create(model="lory:ones", prompt="a", stream=True, **fields)
        events = iter(stream)
        first = next(events)
        process.send_signal(signal.SIGTERM)
        rest = list(events)
        assert [first, *rest][-1].choices[0].finish_reason
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == "stopped\n"
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(model="lory", prompt="a", **fields)
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_served_is_said_in_one_line(run, tmp_path):
    flags = [f"--workdir={run}", "--port=0"]
    assert_one_line_error(verb("serve", *flags, "--domains=fives"), 1, "fives", "ones, threes")
    assert_one_line_error(verb("serve", *flags, "--context=25"), 1, "context", "25")
    assert_one_line_error(verb("serve", *flags, "--queue=0"), 2, "--queue")
    assert_one_line_error(verb("serve", *flags, "--host=192.0.2.1"), 1, "192.0.2.1")


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("requires chromium and chromedriver (Debian: chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ["SE_OFFLINE"] = "true"
    found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    found.set_page_load_timeout(120)
    yield found
    found.quit()


def test_the_page_continues_a_text_and_draws_its_experts(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def at(name):
        return browser.find_element(By.ID, name)

    model = make_model()
    with serving(model) as served:
        browser.get(served.url)
        wait = WebDriverWait(browser, 120)
        wait.until(lambda _: len(Select(at("model")).options) == 1)
        prompt = TEXT[:20] + "<b>&"
        at("prompt").send_keys(prompt)
        at("max_tokens").clear()
        at("max_tokens").send_keys("20")
        at("temperature").clear()
        at("temperature").send_keys("0")
        at("go").click()
        wait.until(lambda _: at("strip").is_displayed())
        expected = model.generate(prompt, temperature=0.0, max_new_tokens=20)[0]
        assert at("text").get_property("textContent") == prompt + expected
        rows = browser.find_elements(By.CSS_SELECTOR, "#segments .row")
        ids = model.encode(prompt + expected)
        assert len(rows) == -(-len(ids) // 8)
        weights = model.routing_weights([ids])[:, 0]  # [layers, segments, experts]
        for layer in ("mean", "1"):
            Select(at("layer")).select_by_value(layer)
            bars = browser.find_elements(By.CSS_SELECTOR, "#segments .row:nth-child(2) span")
            shown = [float(re.search(r"[\d.]+$", bar.get_attribute("title"))[0]) for bar in bars]
            of_layers = weights[:, 1]
            means = of_layers.mean(axis=0) if layer == "mean" else of_layers[1]
            assert shown == pytest.approx(means, abs=2e-3)
        at("prompt").send_keys(" and more" * 40)
        at("go").click()
        wait.until(lambda _: "they must be at most 64" in at("error").text)
    errors = [entry for entry in browser.get_log("browser") if "400" not in entry["message"]]
    assert not errors, json.dumps(errors)


def test_stop_ends_the_text(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def at(name):
        return browser.find_element(By.ID, name)

    with serving(make_model(sequence_length=512), step_seconds=0.05) as served:
        browser.get(served.url)
        at("max_tokens").clear()
        at("max_tokens").send_keys("400")
        at("temperature").clear()
        at("temperature").send_keys("2")
        wait = WebDriverWait(browser, 60)
        wait.until(lambda _: at("model").find_elements(By.TAG_NAME, "option"))
        at("go").click()
        wait.until(lambda _: served.engine.active == 1 and at("text").text)
        at("stop").click()
        wait.until(lambda _: served.engine.active == 0)
        assert at("go").is_enabled()
    assert threading.active_count() < 50
