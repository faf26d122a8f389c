"""The status page, in a real browser, over HTTP and behind the token."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from hook_service import BEARER, MAP_A, MAP_B, TOKEN, call, hook, settings
from needs import need_tool

from layerkit.hook.queue import Outcome, Target, Wish
from layerkit.model.digest import Digest

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>document.title='owned'</script>"


def dom(url: str, folder: Path) -> str:
    need_tool("chromium")
    done = subprocess.run(
        [shutil.which("chromium") or "", "--headless", "--no-sandbox", "--disable-gpu",
         "--virtual-time-budget=4000",
         f"--user-data-dir={folder / 'profile'}", "--dump-dom", url],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(folder)}, check=True,
    )  # fmt: skip
    return done.stdout


def test_the_page_shows_jobs_savings_and_images(tmp_path: Path) -> None:
    config = settings(tmp_path, maps=(MAP_A, MAP_B))
    with hook(config) as (url, queue):
        digests = [Digest.of(b"%d" % n) for n in range(3)]
        for n, digest in enumerate(digests):
            queue.add([Wish(key, Target("main", f"team/app{n}", "v1")) for key in config.keys(digest)])
        layers = [
            {"digest": "sha256:" + "a" * 64, "size": 30_000_000, "kept": True},
            {"digest": HOSTILE, "size": 5_000_000, "kept": False},
        ]
        report = {"layers": layers, "meta_bytes": 12_000, "bytes_read": 5_000_000, "bytes_written": 12_000,
                  "bytes_avoided": 90_000_000}  # fmt: skip
        for claim in queue.claim(3):
            queue.finish(claim, Outcome("done", report=report))
        (claim,) = queue.claim(1)
        queue.finish(claim, Outcome("failed", HOSTILE, permanent=True))
        page = dom(url.replace("http://", f"http://x:{TOKEN}@"), tmp_path)
        headers = call(f"{url}/", headers=BEARER)[1]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    figures = dict(re.findall(r"<dt[^>]*>([^<]*)</dt><dd[^>]*>([^<]*)</dd>", page))
    assert figures["done"] == "3" and figures["waiting"] == "2" and figures["given up"] == "1"
    assert figures["copies avoided"] == "270 MB" and figures["read"] == "15.0 MB"
    assert {"team/app0:v1", "team/app1:v1", "team/app2:v1"} <= set(re.findall(r">(team/app\d:v1)<", page))
    assert page.count("<svg") >= 2 and page.count("<rect") >= 5
    assert 'class="kept"' in page and 'class="new"' in page and 'class="meta"' in page
    # What strangers wrote is text: nothing of it became an element or ran.
    assert "<img" not in page
    assert "<title>layerkit hook</title>" in page
    assert "&lt;img src=x onerror" in page


def test_an_empty_hook_says_what_to_do(tmp_path: Path) -> None:
    with hook(settings(tmp_path)) as (url, _):
        page = dom(url.replace("http://", f"http://x:{TOKEN}@"), tmp_path)
        assert "No image yet" in page
        assert "<dd" in page
        assert "<dd" not in dom(url, tmp_path)  # without the token there is nothing to see
