"""The labelling page in a real browser: Playwright drives the chromium that is installed here."""

import http.server
import json
import random
import shutil
import threading
import time
import urllib.request

import cv2
import numpy as np
import pytest
from playwright.sync_api import sync_playwright

import label_server
from benchmarks.label_server_kills import Server
from label_world import TOKENS, Trainer, World, listening, new_id

FRAMES, SIZE = 12, 16
CLIP = {"frames": FRAMES, "width": SIZE, "height": SIZE, "columns": 5, "fps": 20.0, "pixelated": True}
LINK = f"/?token={TOKENS['labeller']}"
# What a person has behind them after the first visit
KNOWN = """for (const [key, value] of [["labeller", NAME], ["read:Hopper-v5", READ]])
    if (!localStorage.getItem(key)) localStorage.setItem(key, value);"""
# Three pairs are here, and their pictures
READY = "() => held.filter(({images}) => images).length === 3"
# What is on the two canvases: the red channel tells the frame, the green one the clip
SEEN = """() => ["left", "right"].map((side) => {
    const canvas = document.querySelector(`#${side} canvas`);
    const [red, green] = canvas.getContext("2d").getImageData(3, 3, 1, 1).data;
    return [red / 16, green, Number(canvas.dataset.frame)];
})"""


def numbered_sheet(clip: int) -> bytes:
    sheet = np.zeros((-(-FRAMES // 5) * SIZE, 5 * SIZE, 3), np.uint8)
    for frame in range(FRAMES):
        y, x = frame // 5 * SIZE, frame % 5 * SIZE
        sheet[y : y + SIZE, x : x + SIZE] = (0, clip, 16 * frame)  # OpenCV writes blue, green, red
    return cv2.imencode(".webp", sheet, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()


SHEETS = [numbered_sheet(60), numbered_sheet(200)]


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium here: the page was not tried in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One person's browser."""

    def __init__(self, browser, url, name="Ann", **options):
        self.context = browser.new_context(**({"viewport": {"width": 1000, "height": 700}} | options))
        self.context.set_default_timeout(8000)
        if name:
            read = label_server.read_instructions(None)["Hopper-v5"]
            self.context.add_init_script(KNOWN.replace("NAME", json.dumps(name)).replace("READ", json.dumps(read)))
        self.page = self.context.new_page()
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.problems.append(line.text))
        if url:
            self.page.goto(url)

    def wait(self, state="label"):
        self.page.wait_for_selector(f"body[data-state={state}]")

    def serving(self):
        return self.page.evaluate("document.body.dataset.serving")

    def next(self, serving):
        self.page.wait_for_function("(old) => document.body.dataset.serving !== old", arg=serving)

    def do(self, action):
        """Look at a pair long enough, act, and wait for the next pair; the one that was answered."""
        self.wait()
        serving = self.serving()
        self.page.wait_for_timeout(300)
        action()
        self.next(serving)
        return serving

    def hide(self, hidden):
        define = f"Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}})"
        self.page.evaluate(define + "; document.dispatchEvent(new Event('visibilitychange', {bubbles: true}))")

    def sent(self):
        """Wait until the server has acknowledged everything."""
        kept = "Object.keys(localStorage).filter((key) => key.startsWith('out:')).length"
        self.page.wait_for_function(f"() => {kept} === 0", timeout=30_000)


@pytest.fixture
def world(tmp_path):
    random.seed(0)
    world = World(tmp_path / "runs", now=time.time())
    with listening(world) as world.url:
        yield world
    world.close()


@pytest.fixture
def visit(browser, world):
    visits = []

    def start(name="Ann", path=LINK, **options):
        visits.append(Visit(browser, world.url + path, name, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.context.close()
        assert one.problems == []


def put(world, count, run=None):
    run = run or world.run(clip=CLIP)
    numbers = [run.ask(SHEETS) for _ in range(count)]
    world.look()
    return run, numbers


def said(event):
    """The side that a person named, of an event that tells the trainer's clip."""
    sides = ("right", "left") if event["swapped"] else ("left", "right")
    return dict(zip(("first", "second"), sides, strict=True)).get(event["answer"], event["answer"])


def test_every_key_and_button_answers(world, visit):
    put(world, 15)
    one = visit()
    keys = {"ArrowLeft": "left", "a": "left", "A": "left", "ArrowRight": "right", "d": "right", "ArrowUp": "equal"}
    keys |= {"=": "equal", "ArrowDown": "cant-tell"}
    buttons = ("left", "right", "equal", "cant-tell")
    servings = [one.do(lambda key=key: one.page.keyboard.press(key)) for key in keys]
    servings += [one.do(lambda name=name: one.page.click(f"#{name}")) for name in buttons]
    one.page.keyboard.press("Control+ArrowLeft")
    one.sent()
    journal = world.journal()
    assert [event["serving"] for event in journal] == servings
    assert [said(event) for event in journal] == [*keys.values(), *buttons]
    assert {event["labeller"] for event in journal} == {"Ann"}
    assert all(0.25 < event["seconds"] < 5 for event in journal)
    assert {event["swapped"] for event in journal} == {True, False}


def test_a_held_key_an_early_press_and_a_double_click_answer_once(world, visit):
    put(world, 9)
    one = visit()

    def hold(key):  # for longer than a new pair is deaf; from the second on event.repeat is set
        for _ in range(5):
            one.page.keyboard.down(key)
            one.page.wait_for_timeout(120)

    for action in (
        lambda: hold("ArrowLeft"),
        lambda: one.page.evaluate("[1, 2].forEach(() => document.querySelector('#left').click())"),
        lambda: one.page.dblclick("#right"),
        lambda: one.page.dblclick("#equal", delay=150),
    ):
        one.do(action)
        one.page.keyboard.up("ArrowLeft")
        one.page.wait_for_timeout(300)
    one.page.focus("#left")
    one.do(lambda: hold("Enter"))
    one.page.wait_for_timeout(300)
    one.sent()
    assert [said(event) for event in world.journal()] == ["left", "left", "right", "equal", "left"]


def test_undo_shows_the_pair_again_and_the_new_answer_counts(world, visit):
    run, _ = put(world, 4)
    one = visit()
    first = one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    second = one.do(lambda: one.page.keyboard.press("ArrowDown"))
    for expected in (second, first):
        before = one.serving()
        one.page.keyboard.press("u")
        one.next(before)
        assert one.serving() == expected
    assert one.do(lambda: one.page.keyboard.press("ArrowUp")) == first
    assert one.do(lambda: one.page.click("#right")) == second
    one.sent()
    journal = world.journal()
    assert [event["kind"] for event in journal] == ["answer", "answer", "undo", "undo", "answer", "answer"]
    assert [event["id"] for event in journal[2:4]] == [journal[1]["id"], journal[0]["id"]]
    world.look(label_server.GRACE + 1)
    assert run.answers() == {event["pair"]: label_server.MU[event["answer"]] for event in journal[4:]}


def test_both_canvases_show_the_same_frame_and_the_last_one_stays(world, visit):
    put(world, 1)
    one = visit()
    one.wait()
    watch = """() => new Promise((done) => {
        const look = SEEN, start = performance.now(), rows = [];
        const again = (now) => {
            rows.push([now, ...look()]);
            now - start < 2600 ? requestAnimationFrame(again) : done(rows);
        };
        requestAnimationFrame(again);
    })""".replace("SEEN", SEEN)
    rows = one.page.evaluate(watch)
    for _, left, right in rows:
        assert left[0] == right[0] == left[2] == right[2]
        assert {left[1], right[1]} == {60, 200}
    frames = np.array([left[0] for _, left, _ in rows])
    times = np.array([now for now, *_ in rows]) / 1000
    assert set(frames) == set(range(FRAMES))
    ends = np.flatnonzero((frames[:-1] == FRAMES - 1) & (frames[1:] == 0))
    assert len(ends) >= 2  # a loop takes 12 / 20 + 0.4 seconds
    assert times[ends[1]] - times[ends[0]] == pytest.approx(FRAMES / 20 + 0.4, abs=0.15)
    second = (np.arange(len(frames)) > ends[0]) & (np.arange(len(frames)) <= ends[1])
    stay = times[second & (frames == FRAMES - 1)]
    assert stay[-1] - stay[0] == pytest.approx(1 / 20 + 0.4, abs=0.12)


def test_pause_step_speed_and_help(world, visit):
    put(world, 1)
    one = visit()
    one.wait()

    def frame():
        one.page.wait_for_timeout(80)
        left, right = one.page.evaluate(SEEN)
        assert left[0] == right[0] == left[2]
        return left[0]

    one.page.keyboard.press(" ")
    paused = frame()
    one.page.wait_for_timeout(200)
    assert frame() == paused
    one.page.keyboard.press(".")
    assert frame() == (paused + 1) % FRAMES
    for _ in range(2):
        one.page.keyboard.press(",")
    assert frame() == (paused - 1) % FRAMES
    one.page.keyboard.press("Space")
    one.page.wait_for_timeout(700)
    assert one.page.inner_text("#pause").split() == ["space", "pause"]
    speeds = []
    for _ in range(3):
        one.page.keyboard.press("s")
        speeds.append(one.page.inner_text("#speed").split()[-1])
    assert speeds == ["2×", "0.5×", "1×"]
    one.page.keyboard.press("?")
    assert "Which hopper gets further to the right?" in one.page.inner_text("#rules")
    one.page.keyboard.press("ArrowLeft")  # answers nothing behind the instructions
    one.page.keyboard.press("?")
    assert not one.page.is_visible("#rules")
    assert world.journal() == []


def test_a_first_visit_shows_an_example_and_asks_the_name(world, visit):
    put(world, 9)
    one = visit(name=None)
    one.wait("name")
    assert "Say which one is better" in one.page.inner_text("#hello")
    example = "#hello .arrives"
    before = one.page.locator(example).screenshot()
    one.page.wait_for_timeout(500)
    assert one.page.locator(example).screenshot() != before  # it moves
    one.page.keyboard.press("Escape")  # a name is needed
    one.page.fill("input", " <b>Ann</b> ")
    one.page.keyboard.press("Enter")
    one.wait()
    assert TOKENS["labeller"] not in one.page.url
    assert one.page.inner_text("#who") == "<b>Ann</b>"
    assert "Which hopper gets further to the right?" in one.page.inner_text("#rules")
    one.page.keyboard.press("Enter")
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    assert [event["labeller"] for event in world.journal()] == ["<b>Ann</b>"]
    one.page.reload()
    one.wait()
    assert not one.page.is_visible("#rules")
    assert not one.page.is_visible("#hello")


def test_an_empty_queue_goes_on_by_itself(world, visit):
    one = visit()
    one.wait("waiting")
    one.page.wait_for_function("() => document.querySelector('#notice').innerText.includes('as soon as a trainer')")
    run, _ = put(world, 1)
    one.do(lambda: one.page.keyboard.press("ArrowUp"))
    one.wait("waiting")
    one.page.wait_for_function("() => document.querySelector('#notice').innerText.includes('within a minute')")
    put(world, 1, run)
    one.do(lambda: one.page.keyboard.press("ArrowUp"))
    one.sent()
    assert len(world.journal()) == 2


def test_who_went_away_from_an_empty_queue_is_called_back(world, visit):
    one = visit()
    one.wait("waiting")
    one.page.evaluate("touchedAt = -IDLE - 1")
    one.page.wait_for_function("() => document.querySelector('#notice').innerText.includes('as soon as a trainer')")
    put(world, 1)
    one.page.wait_for_function("() => document.querySelector('#notice').innerText.includes('Are you still there?')")
    one.page.keyboard.press("Shift")
    one.wait()


def test_a_run_may_have_any_name(world, visit):
    run, _ = put(world, 2, world.run("hopper #2?", clip=CLIP))
    one = visit()
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    assert [event["run"] for event in world.journal()] == [run.folder.name]


def test_an_answer_that_the_server_could_not_take_is_sent_again(world, visit):
    put(world, 2)
    one, refused = visit(), []

    def fail_once(route):
        refused.append(route.request.post_data)
        route.fulfill(status=503, body="{}")

    one.page.route("**/api/answers", fail_once, times=1)
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    assert [event["id"] for event in world.journal()] == [json.loads(refused[0])["id"]]
    one.problems[:] = [line for line in one.problems if "503" not in line]


def test_a_connection_that_hangs_is_given_up(world, visit):
    put(world, 5)
    one = visit()
    one.wait()
    one.page.wait_for_function(READY)
    one.page.evaluate("const inFact = AbortSignal.timeout; AbortSignal.timeout = () => inFact.call(AbortSignal, 500)")
    hung = []  # each for half a second, and the page tries again after 3 s; `do` waits 8 s
    for path in ("answers", "claim"):
        one.page.route(f"**/api/{path}", lambda route: hung.append(route), times=1)
    for _ in range(5):
        one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    assert len(hung) == 2
    assert len(world.journal()) == 5


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 404, "content_type": "text/plain", "body": "404 page not found"},
        {"status": 200, "content_type": "text/html", "body": "<html>Log in to use this Wi-Fi</html>"},
    ],
)
def test_what_answers_in_place_of_the_server_costs_no_answer(world, visit, answer):
    put(world, 6)
    one, away = visit(), True
    one.wait()
    one.page.wait_for_function(READY)

    def fail_while_away(route):
        if away:
            route.fulfill(**answer)
        else:
            route.continue_()

    one.page.route("**/api/**", fail_while_away)
    one.page.evaluate("talk()")
    one.page.wait_for_timeout(200)
    servings = [one.do(lambda: one.page.keyboard.press("ArrowLeft")) for _ in range(3)]
    assert world.journal() == []
    one.page.wait_for_function("() => document.querySelector('#unsent').innerText.includes('3 kept here')")
    away = False
    one.sent()
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    assert [event["serving"] for event in world.journal()][:3] == servings
    one.problems[:] = [line for line in one.problems if "404" not in line]


def test_what_the_server_itself_refuses_is_not_sent_for_ever(world, visit):
    put(world, 2)
    one = visit()
    one.wait()
    bad = {"id": new_id(), "serving": new_id(), "labeller": "Ann", "answer": "left", "seconds": 1}
    bodies = [bad, bad | {"seconds": -1}, bad | {"serving": one.serving(), "labeller": "Bob"}]
    one.page.evaluate("(bodies) => bodies.forEach((body) => send('api/answers', body))", bodies)
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    kept = "() => [...out.values()].map(({body}) => body)"
    one.page.wait_for_function(f"() => ({kept})().length === 1")
    assert one.page.evaluate(kept) == [bad]  # another server may be at this address for the moment
    one.page.evaluate("(body) => out.set(`out:${now() - WEEK - 1}:`, {url: 'api/answers', body})", bad)
    one.page.evaluate("talk()")
    one.page.wait_for_function("() => [...out.keys()].every((key) => now() - key.split(':')[1] < WEEK)")
    assert len(world.journal()) == 1
    one.problems[:] = [line for line in one.problems if not any(code in line for code in ("404", "409", "422"))]


def test_two_people_are_never_given_the_same_pair(world, visit):
    _, queries = put(world, 8)
    people = [visit("Ann"), visit("Bob")]
    for i in range(4):
        for one in people:
            one.do(lambda one=one, i=i: one.page.keyboard.press(("ArrowLeft", "ArrowUp")[i % 2]))
    for one in people:
        one.wait("waiting")
        one.sent()
    journal = world.journal()
    assert sorted(event["pair"] for event in journal) == sorted(queries)
    assert [sum(event["labeller"] == name for event in journal) for name in ("Ann", "Bob")] == [4, 4]
    assert all(event["counted"] for event in journal)


def test_a_loaded_page_goes_on_with_the_pairs_it_had(world, visit):
    put(world, 9)
    one = visit()
    one.wait()
    one.page.wait_for_function(READY)
    serving = one.serving()
    one.page.goto(f"{world.url}/openapi.json")  # in a reload the first request may overtake the old page's last
    for _ in range(100):
        if all(held.leased <= world.now for held in world.store.servings.values()):
            break
        one.page.wait_for_timeout(50)
    one.page.goto(world.url + LINK)
    one.wait()
    assert one.serving() == serving
    assert one.do(lambda: one.page.keyboard.press("ArrowUp")) == serving
    for _ in range(8):
        one.do(lambda: one.page.keyboard.press("ArrowUp"))
    one.sent()
    assert len({event["pair"] for event in world.journal()}) == 9


def test_a_new_name_answers_no_pair_that_was_served_to_the_old_one(world, visit):
    one, under_way = visit(), []
    one.wait("waiting")
    one.page.route("**/api/claim", lambda route: under_way.append(route), times=1)
    one.page.wait_for_timeout(1500)
    put(world, 1)
    one.page.click("#who")
    one.page.fill("input", "Bob")
    one.page.keyboard.press("Enter")
    with one.page.expect_response("**/api/claim"):
        under_way[0].continue_()
    one.page.wait_for_timeout(500)
    one.page.wait_for_function("() => held.length === 0")  # on a busy machine its pictures take longer
    assert one.page.get_attribute("body", "data-state") == "waiting"
    world.now += label_server.LEASE + 1
    one.do(lambda: one.page.keyboard.press("ArrowUp"))
    one.sent()
    assert [event["labeller"] for event in world.journal()] == ["Bob"]


def test_a_loaded_page_leaves_the_pairs_of_another_name(world, visit):
    put(world, 1)
    one = visit()
    one.wait()
    serving = one.serving()
    one.page.evaluate("localStorage.setItem('labeller', 'Bob')")  # in another tab
    one.page.reload()
    one.wait()
    assert one.serving() != serving  # Ann's page let go of it
    one.do(lambda: one.page.keyboard.press("ArrowUp"))
    one.sent()
    assert [event["labeller"] for event in world.journal()] == ["Bob"]


@pytest.mark.parametrize("how", ["key", "click", "tab"])
def test_who_comes_back_answers_nothing_that_others_have_answered(world, visit, how):
    put(world, 9)
    one = visit()
    one.wait()
    one.page.wait_for_function(READY)
    stale = one.serving()

    if how == "tab":
        one.hide("true")
    one.page.evaluate("touchedAt -= IDLE")
    world.now += label_server.LEASE + 1
    world.answer(world.claim("Bob"), "equal", "Bob")  # the newest, which Ann has before her
    if how == "tab":
        one.hide("false")
    one.page.click("#left") if how == "click" else one.page.keyboard.press("ArrowLeft")
    one.next(stale)
    one.do(lambda: one.page.keyboard.press("ArrowRight"))
    one.sent()
    assert [(event["labeller"], event["counted"]) for event in world.journal()] == [("Bob", True), ("Ann", True)]
    one.problems[:] = [line for line in one.problems if "409" not in line]


def test_motion_waits_for_who_prefers_it(world, visit):
    put(world, 1)
    one = visit(reduced_motion="reduce")
    one.wait()
    one.page.wait_for_timeout(300)
    assert one.page.evaluate(SEEN)[0][0] == 0
    assert one.page.inner_text("#pause").split() == ["space", "play"]
    one.page.click("#pause")
    one.page.wait_for_function("() => document.body.querySelector('#left canvas').dataset.frame > 2")


def test_a_phone_labels_by_touch_without_scrolling(world, visit):
    put(world, 4)
    one = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2)
    one.wait()
    page = one.page
    assert page.evaluate("[document.scrollingElement.scrollHeight, document.scrollingElement.scrollWidth]") == [
        844,
        390,
    ]
    boxes = {name: page.locator(f"#{name}").bounding_box() for name in ("left", "right", "equal", "cant-tell", "undo")}
    for name, box in boxes.items():
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= 390, name
        assert box["y"] + box["height"] <= 844, name
        assert box["height"] >= 30, name
    assert boxes["left"]["y"] + boxes["left"]["height"] <= boxes["right"]["y"]  # one above the other
    assert boxes["left"]["height"] > 250
    servings = [one.do(lambda name=name: page.tap(f"#{name}")) for name in ("left", "right", "cant-tell")]
    before = one.serving()
    page.tap("#undo")
    one.next(before)
    one.do(lambda: page.tap("#equal"))
    one.sent()
    journal = world.journal()
    assert [said(event) for event in journal] == ["left", "right", "cant-tell", "cant-tell", "equal"]
    assert [event["serving"] for event in journal] == [*servings, servings[-1], servings[-1]]


@pytest.mark.parametrize("width, height", [(1280, 800), (1000, 700), (800, 600), (683, 320), (568, 320)])
def test_a_small_window_cuts_nothing_off(world, visit, width, height):
    put(world, 1)
    one = visit(viewport={"width": width, "height": height})
    one.wait()
    shown = one.page.locator("canvas, button:not(dialog *)")
    assert shown.count() == 13
    for box in [part.bounding_box() for part in shown.all()]:
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        assert 0 <= box["y"] <= box["y"] + box["height"] <= height
    left, right = (one.page.locator(f"#{side} canvas").bounding_box() for side in ("left", "right"))
    assert left["width"] == pytest.approx(right["width"], abs=1)
    assert min(left["width"], left["height"]) > 0.3 * height


def test_a_link_from_another_site_works_and_so_does_loading_again(world, visit):
    """A web mail is another site: a cookie for this site only must be set, and be found again."""
    put(world, 3)

    class Mail(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(f'<link rel=icon href="data:,"><a href="{world.url}{LINK}">label</a>'.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Mail) as mail:
        threading.Thread(target=mail.serve_forever, daemon=True).start()
        one = visit(path="/stats")  # a stranger there
        one.page.wait_for_function("() => document.body.innerText.includes('open the stats link')")
        assert one.context.cookies() == []
        one.problems.clear()  # the browser's own lines about the 401
        one.page.goto(f"http://localhost:{mail.server_address[1]}/")
        one.page.click("a")
        one.do(lambda: one.page.keyboard.press("ArrowLeft"))
        assert one.page.url == world.url + "/"
        (cookie,) = one.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["value"]) == (True, "Strict", TOKENS["labeller"])
        one.page.reload()
        one.do(lambda: one.page.keyboard.press("ArrowLeft"))
        mail.shutdown()
    one.sent()
    assert len(world.journal()) == 2
    one.problems[:] = [line for line in one.problems if "401" not in line]


def test_a_stranger_is_told_to_use_the_link(world, visit):
    put(world, 1)
    one = visit(path="/?token=wrong")
    one.wait("stranger")
    assert "open the link" in one.page.inner_text("#notice")
    one.problems[:] = [line for line in one.problems if "401" not in line]


def test_a_stranger_answers_no_pair_that_is_out_of_sight(world, visit):
    put(world, 5)
    one = visit()
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    one.context.clear_cookies()
    one.page.evaluate("talk()")
    one.wait("stranger")
    for key in ("ArrowLeft", "u", "ArrowLeft"):
        one.page.wait_for_timeout(300)
        one.page.keyboard.press(key)
    assert one.page.evaluate("out.size") == 0
    assert one.page.get_attribute("body", "data-state") == "stranger"
    one.problems[:] = [line for line in one.problems if "401" not in line]


def test_a_server_that_is_killed_in_the_middle_gets_every_answer_once(browser, tmp_path):
    server = Server(tmp_path, "--repeat-frac", "0", "--overlap-frac", "0")
    run, one = Trainer(server.runs / "one", clip=CLIP), None
    try:
        for _ in range(9):
            run.ask(SHEETS)
        one = Visit(browser, f"{server.url}/?token={server.tokens['labeller']}")
        servings = [one.do(lambda: one.page.keyboard.press("ArrowLeft"))]
        one.page.wait_for_function(READY)
        server.kill()
        servings += [one.do(lambda: one.page.keyboard.press("ArrowUp")) for _ in range(2)]
        one.page.keyboard.press("u")  # one of those was a slip
        servings += [servings[-1], one.do(lambda: one.page.keyboard.press("ArrowRight"))]
        one.page.wait_for_function("() => document.querySelector('#unsent').innerText.includes('kept here')")
        server.start()
        one.sent()
        one.do(lambda: one.page.keyboard.press("ArrowLeft"))
        one.sent()
        journal = [json.loads(line) for line in server.call("GET", "/export.jsonl", role="admin").splitlines()]
        assert [event["serving"] for event in journal[:5]] == servings
        assert [event["kind"] for event in journal] == ["answer", "answer", "answer", "undo", "answer", "answer"]
        assert [said(journal[i]) for i in (0, 1, 2, 4, 5)] == ["left", "equal", "equal", "right", "left"]
    finally:
        if one:
            one.context.close()
        server.kill()


def test_new_instructions_are_shown_to_who_has_read_the_old_ones(browser, tmp_path):
    server = Server(tmp_path, "--repeat-frac", "0", "--overlap-frac", "0")
    run, one = Trainer(server.runs / "one", clip=CLIP), None
    try:
        run.ask(SHEETS)
        one = Visit(browser, f"{server.url}/?token={server.tokens['labeller']}")
        one.do(lambda: one.page.keyboard.press("ArrowLeft"))
        one.wait("waiting")
        assert not one.page.is_visible("#rules")
        server.kill()
        (tmp_path / "told.txt").write_text("Which backflip is rounder?\nLook at the knees.\n")
        server.command += ["--instructions", str(tmp_path / "told.txt")]
        server.start()
        run.ask(SHEETS)
        one.page.wait_for_selector("#rules[open]")
        assert "Which backflip is rounder?\nLook at the knees." in one.page.inner_text("#rules")
        one.page.keyboard.press("Enter")
        assert one.page.inner_text("#question") == "Which backflip is rounder?"
        one.page.reload()
        one.wait()
        one.page.wait_for_timeout(300)
        assert not one.page.is_visible("#rules")
    finally:
        if one:
            one.context.close()
        server.kill()


# Odd surroundings -----------------------------------------------------------------------------------------------------
def test_a_full_storage_costs_no_answer(world, visit):
    put(world, 3)
    one = visit()
    one.wait()
    fill = "try { for (;;) localStorage[n + Math.random()] = 'x'.repeat(n) } catch {}"
    one.page.evaluate(f"for (let n = 2 ** 22; n; n >>= 1) {fill}")
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.page.wait_for_function("() => out.size === 0")
    assert len(world.journal()) == 1
    one.page.route("**/api/answers", lambda route: route.abort())
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.page.wait_for_function("() => document.querySelector('#said').textContent.includes('leave this page open')")
    one.page.unroute("**/api/answers")
    one.page.wait_for_function("() => out.size === 0", timeout=30_000)
    assert len(world.journal()) == 2
    one.problems[:] = [line for line in one.problems if "ERR_FAILED" not in line]


def test_blocked_site_data_is_told(world, visit):
    one = visit(name=None, path="/nowhere")
    one.page.wait_for_timeout(300)
    one.problems.clear()
    block = (
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('denied', 'SecurityError') }})"
    )
    one.context.add_init_script(block)
    one.page.goto(world.url + LINK)
    one.wait("blocked")
    assert "allow cookies and site data" in one.page.inner_text("#notice")


def test_a_browser_without_scripts_is_told(world, visit):
    one = visit(name=None, java_script_enabled=False)
    assert "needs JavaScript" in one.page.inner_text("#notice")


def test_a_duplicated_tab_has_pairs_of_its_own(world, visit):
    put(world, 9)
    one = visit()
    one.wait()
    copied = one.page.evaluate("JSON.stringify({...sessionStorage})")
    one.context.add_init_script(f"for (const [k, v] of Object.entries({copied})) sessionStorage.setItem(k, v)")
    other = one.context.new_page()
    other.goto(world.url + LINK)
    other.wait_for_selector("body[data-state=label]")
    assert other.evaluate("document.body.dataset.serving") != one.serving()


def test_answers_to_a_run_that_is_away_are_kept_in_order(world, visit):
    """A mount that fails for some seconds. The slip in between is undone."""
    run, _ = put(world, 6)
    one = visit()
    one.wait()
    one.page.wait_for_function(READY)
    one.page.route("**/api/claim", lambda claim: None)  # it would drop the pairs that are here
    run.folder.rename(world.folder.parent / "away")
    first = one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    slip = one.do(lambda: one.page.keyboard.press("ArrowRight"))
    one.do(lambda: one.page.keyboard.press("u"))
    one.page.wait_for_function("() => out.size === 3")
    assert world.journal() == []
    (world.folder.parent / "away").rename(run.folder)
    one.page.unroute("**/api/claim")
    one.page.evaluate("talk()")
    one.sent()
    assert [(event["kind"], event["serving"]) for event in world.journal()] == [
        ("answer", first),
        ("answer", slip),
        ("undo", slip),
    ]
    one.problems[:] = [line for line in one.problems if not any(code in line for code in ("404", "410"))]


def test_a_refused_answer_is_told(world, visit):
    put(world, 1)
    one = visit()
    one.wait()
    one.page.wait_for_timeout(300)
    with world.store.lock:
        world.store.servings[one.serving()].who = "Bob"
    one.page.keyboard.press("ArrowLeft")
    one.page.wait_for_function("() => document.querySelector('#said').textContent.startsWith('not taken: ')")
    one.page.wait_for_timeout(300)
    one.problems[:] = [line for line in one.problems if "409" not in line]


def test_the_last_pair_can_be_undone_while_the_page_waits(world, visit):
    put(world, 1)
    one = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    slip = one.do(lambda: one.page.tap("#left"))
    one.wait("waiting")
    assert one.page.is_visible("#said")
    one.page.tap("#undo")
    one.wait()
    assert one.serving() == slip


def test_a_pair_that_comes_without_a_press_takes_none_at_first(world, visit):
    """Ann holds the mouse button down while somebody else's answer takes her pair away."""
    put(world, 6)
    one = visit()
    one.wait()
    one.page.wait_for_function(READY)
    one.page.wait_for_timeout(300)
    box = one.page.locator("#left").bounding_box()
    one.page.mouse.move(box["x"] + 50, box["y"] + 50)
    one.page.mouse.down()
    before = one.serving()
    one.page.evaluate("() => drop((entry) => entry === shown)")
    one.next(before)
    one.page.wait_for_timeout(900)  # longer than any guard
    one.page.mouse.up()
    one.page.wait_for_timeout(200)
    assert world.journal() == []
    one.page.click("#left")
    one.sent()
    assert len(world.journal()) == 1


def test_whose_tool_only_clicks_is_not_away(world, visit):
    """A screen reader clicks without a pointer; the page was last touched more than five minutes ago."""
    put(world, 2)
    one = visit()
    one.wait()
    one.page.wait_for_timeout(300)
    one.page.evaluate("() => touchedAt = performance.now() - IDLE - 1000")
    one.page.evaluate("() => document.querySelector('#left').click()")  # brings the page back, and answers nothing
    one.page.wait_for_function("() => performance.now() - touchedAt < 10_000 && shownAt < Infinity")
    assert world.journal() == []
    one.do(lambda: one.page.evaluate("() => document.querySelector('#left').click()"))
    one.sent()
    assert len(world.journal()) == 1


def test_a_window_that_is_taller_than_wide_keeps_the_clips_side_by_side(world, visit):
    """The arrow up means "equally good" there; on a phone, which has no arrows, one clip lies above the other."""
    put(world, 1)
    one = visit(viewport={"width": 700, "height": 1000})
    one.wait()
    left, right = (one.page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_escape_takes_over_no_name(world, visit):
    put(world, 2)
    one = visit()
    one.wait()
    serving = one.serving()
    one.page.click("#who")
    one.page.keyboard.type("d")
    one.page.keyboard.press("Escape")
    assert one.page.inner_text("#who") == "Ann"
    assert one.serving() == serving
    one.page.click("#who")
    one.page.fill("#hello input", "Ann\tB")
    one.page.keyboard.press("Enter")
    one.page.wait_for_function("() => document.querySelector('#who').textContent === 'Ann B'")
    one.wait()


def test_an_undone_answer_is_not_sent_as_the_page_closes(world, visit):
    """Beacons may overtake each other: then the undoing comes first, is refused, and the slip trains."""
    put(world, 6)
    one = visit()
    one.wait()
    one.page.wait_for_function(READY)
    one.page.route("**/api/answers*", lambda route: None)  # hangs
    slip = one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.do(lambda: one.page.keyboard.press("u"))
    assert one.serving() == slip
    sent = "() => {const sent = []; navigator.sendBeacon = (url) => sent.push(url); "
    sent += "dispatchEvent(new Event('pagehide')); return sent}"
    urls = one.page.evaluate(sent)
    assert len(urls) == 2
    assert "undo" in urls[0]
    assert urls[1] == "api/claim"


def test_keys_go_by_position_where_the_layout_has_no_latin_letters(world, visit):
    put(world, 3)
    one = visit()
    press = "(keys) => dispatchEvent(new KeyboardEvent('keydown', {key: keys[0], code: keys[1], bubbles: true}))"
    one.do(lambda: one.page.evaluate(press, ["ф", "KeyA"]))
    before = one.serving()
    one.page.evaluate(press, ["г", "KeyU"])
    one.next(before)
    one.do(lambda: one.page.evaluate(press, ["γ", "KeyD"]))
    one.page.evaluate(press, ["ы", "KeyS"])
    one.wait()
    assert one.page.inner_text("#speed").split()[-1] == "2×"
    one.wait()
    one.page.wait_for_timeout(300)
    one.page.evaluate(press, ["u", "KeyA"])  # a Latin layout of another order: by letter
    one.sent()
    assert [said(event) for event in world.journal() if event["kind"] == "answer"] == ["left", "right"]


def test_behind_the_path_of_a_proxy(world, visit):
    put(world, 3)

    class Proxy(http.server.BaseHTTPRequestHandler):
        """https://host/labels/ -> the server's root, as nginx's proxy_pass with a slash at its end."""

        def forward(self):
            if not self.path.startswith("/labels/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            names = ("content-type", "cookie", "sec-fetch-site", "host")
            headers = {name: self.headers[name] for name in names if self.headers[name]}
            url = world.url + self.path.removeprefix("/labels")
            request = urllib.request.Request(url, body or None, headers, method=self.command)
            with urllib.request.urlopen(request) as reply:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    if name.lower() not in ("date", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.read())

        do_GET = do_POST = forward

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        one = visit(path="/nowhere")
        one.page.wait_for_timeout(300)
        one.problems.clear()
        address = f"http://localhost:{proxy.server_address[1]}/labels"
        one.page.goto(address + LINK)
        one.do(lambda: one.page.keyboard.press("ArrowLeft"))
        one.sent()
        one.page.goto(f"{address}/stats?token={TOKENS['admin']}")
        one.page.wait_for_selector("table")
        proxy.shutdown()
    assert len(world.journal()) == 1


def test_undo_survives_a_reload(world, visit):
    put(world, 9)
    one = visit()
    first = one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    one.page.reload()
    one.wait()
    one.page.wait_for_function("() => undoable.length === 1")
    before = one.serving()
    one.page.keyboard.press("u")
    one.next(before)
    one.wait()  # its pictures are fetched again
    assert one.serving() == first
    assert {clip for _, clip, _ in one.page.evaluate(SEEN)} == {60, 200}
    one.do(lambda: one.page.keyboard.press("ArrowUp"))
    one.sent()
    assert [event["kind"] for event in world.journal()] == ["answer", "undo", "answer"]


def test_undo_is_refused_once_the_agent_has_learned(world, visit):
    put(world, 9)
    one = visit()
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    one.sent()
    world.look(label_server.GRACE + 1)  # the page's own clock says that there is time
    before = one.serving()
    one.page.route("**/api/claim", lambda claim: None)  # a slow line: the page waits for its next pairs
    one.page.keyboard.press("u")
    one.page.wait_for_function("() => document.querySelector('#said').textContent.includes('learned from this')")
    assert one.serving() == before
    one.page.keyboard.press("ArrowRight")  # it was meant for the pair that went
    one.page.unroute("**/api/claim")  # lets go of what it held, too
    one.page.wait_for_timeout(300)
    assert [event["kind"] for event in world.journal()] == ["answer"]
    one.page.wait_for_timeout(600)
    one.do(lambda: one.page.keyboard.press("ArrowRight"))
    one.sent()
    assert [event["kind"] for event in world.journal()] == ["answer", "answer"]
    one.problems[:] = [line for line in one.problems if "409" not in line]


def test_a_closed_tab_lets_go_of_its_pair(world, visit):
    put(world, 1)
    one, other = visit(), visit("Bob")
    one.wait()
    other.page.wait_for_function("() => document.querySelector('#notice').innerText.includes('with others')")
    one.page.close(run_before_unload=True)
    other.wait()


def test_a_tab_in_the_background_leaves_the_pairs_to_others(world, visit):
    put(world, 1)
    one = visit()
    one.wait()
    pair = one.serving()
    one.hide("true")
    one.page.wait_for_timeout(500)
    one.hide("false")  # at once again: nobody else got it
    one.page.wait_for_timeout(500)
    assert one.serving() == pair
    one.hide("true")
    one.page.wait_for_timeout(500)
    assert world.claim("Bob")
    one.page.evaluate("talk()")
    one.page.wait_for_function("() => document.title === '● Clips are here'")
    one.hide("false")
    one.wait("waiting")


def test_a_slow_line_is_told_and_keeps_no_claim_waiting(world, visit):
    put(world, 9)
    one, pictures = visit(path="/nowhere"), []
    one.page.wait_for_timeout(300)
    one.problems.clear()
    one.page.route("**/api/clips/**", lambda route: pictures.append(route))
    one.page.goto(world.url + LINK)
    one.page.wait_for_function("() => document.querySelector('#notice').innerText.includes('on their way')")
    one.page.wait_for_function("() => held.length === 3")
    for route in pictures:
        route.continue_()
    one.wait()


def test_pictures_may_take_longer_than_answers(world, visit):
    put(world, 9)
    one, pictures = visit(path="/nowhere"), []
    one.page.wait_for_timeout(300)
    one.problems.clear()
    faster = "const inFact = AbortSignal.timeout; AbortSignal.timeout = (ms) => inFact.call(AbortSignal, ms / 10)"
    one.page.add_init_script(faster)
    one.page.route("**/api/clips/**", lambda route: pictures.append(route))
    one.page.goto(world.url + LINK)
    one.page.wait_for_function("() => held.length === 3")
    one.page.wait_for_timeout(5000)  # of the 12 s that the page allows them here; answers have 2 s
    assert len(pictures) == 6
    for route in pictures:
        route.continue_()
    one.page.wait_for_function(READY)


def test_pictures_that_are_gone_are_not_waited_for(world, visit):
    run, _ = put(world, 2)
    run.path(1, ".0.webp").unlink()  # of the newest, which comes first
    one = visit()
    one.page.wait_for_selector("body[data-state=label]", timeout=4000)
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    assert [event["pair"] for event in world.journal()] == [0]
    one.problems[:] = [line for line in one.problems if "410" not in line]


def test_the_link_of_a_run_shows_that_run_after_a_reload_too(world, visit):
    run, _ = put(world, 9)
    put(world, 9)
    one = visit(path=f"{LINK}&run={run.folder.name}")
    one.wait()
    one.page.reload()
    one.wait()
    one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    assert TOKENS["labeller"] not in one.page.url
    assert {event["run"] for event in world.journal()} == {run.folder.name}


def test_a_stopped_run_leaves_the_screen_and_comes_back(world, visit):
    run, _ = put(world, 2)
    one = visit()
    one.wait()
    run.stop()
    world.look()
    one.page.evaluate("talk()")
    one.wait("waiting")
    assert "not running" in one.page.inner_text("#notice")
    run.start()
    world.look()
    one.wait()


def test_the_end_shows_what_became_of_the_agent(world, visit):
    run, _ = put(world, 2)
    one = visit()
    for _ in range(2):
        one.do(lambda: one.page.keyboard.press("ArrowLeft"))
    one.sent()
    world.look(label_server.GRACE + 1)
    run.status(phase="finished")
    world.look()
    one.page.wait_for_function("() => document.querySelector('#notice').innerText.includes('2 of them yours')")
    one.page.wait_for_selector("#notice figure canvas")
    assert one.page.locator("#notice figure").all_inner_texts() == ["at the start", "at the end"]


def test_no_mark_stays_on_the_side_that_was_chosen(world, visit):
    put(world, 3)
    one = visit()
    border = "getComputedStyle(document.querySelector('#left')).borderColor"
    one.wait()
    plain = one.page.evaluate(border)
    one.page.hover("#left")
    assert one.page.evaluate(border) != plain
    one.do(lambda: one.page.mouse.click(250, 350))
    assert one.page.evaluate(border) == plain
    one.wait()
    one.page.keyboard.press("Tab")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert one.page.evaluate(outline) != "none"


def test_a_long_name_is_cut_and_the_dialog_opens_at_its_top(world, visit):
    put(world, 3)
    one = visit("W" * 40, viewport={"width": 640, "height": 360})
    one.wait()
    assert one.page.locator("#who").bounding_box()["width"] < 200
    one.page.keyboard.press("?")
    dialog = "document.querySelector('#rules')"
    assert one.page.evaluate(f"{dialog}.scrollHeight > {dialog}.clientHeight && {dialog}.scrollTop === 0")


def test_the_study_page_bars_pauses_and_shows_doubtful_answers(world, visit):
    run = world.run(clip=CLIP)
    run.ask(SHEETS, sums=(1.0, 2.0))
    world.look()
    pair = world.claim("<i>Bob</i>")
    world.answer(pair, "left" if pair["sums"][0] == 1.0 else "right", "<i>Bob</i>")
    one = visit(path=f"/stats?token={TOKENS['admin']}")
    one.page.click("summary")
    one.page.wait_for_selector("details canvas")
    assert "true sum 2.00" in one.page.inner_text("details")
    one.page.click("button:text-is('bar')")
    one.page.wait_for_selector("text=let in again")
    assert world.store.marks == {("barred", "<i>Bob</i>")}
    one.page.click("button:text-is('pause')")
    one.page.wait_for_selector("button:text-is('go on')")
    assert world.claim("Ann") is None
    assert "paused" in world.claimed["notice"]
