"""The hook over a registry with the referrers API, held to the letter of distribution-spec 1.1."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from hook_service import BEARER, MAP_A, call, event, hook_process, write_config
from made_images import MANIFEST
from programs import wait_for
from pushed_images import REMAP, ask, image, settled
from registry_fake import fake_registry


def test_artifacts_come_by_the_referrers_api_and_once(tmp_path: Path) -> None:
    """What the hook publishes is listed by the API, no tag stands in for it, and a second hook writes nothing."""
    data, blobs, _ = image(1)
    with fake_registry() as fake:
        subject = fake.put("team/app", "v1", data, MANIFEST)
        fake.repo("team/app").blobs.update(blobs)
        for turn in ("first", "second"):  # each with state and store of its own: only the registry remembers
            config = write_config(tmp_path, fake.host, MAP_A, name=f"{turn}-")
            writes = fake.count("PUT") + fake.count("POST") + fake.count("PATCH")
            with hook_process(config, log=tmp_path / "log") as (_, url):
                told = {"events": [event("team/app", subject, tag="v1")]}
                assert call(f"{url}/v1/events/main", told)[0] == 202
                wait_for(partial(settled, url, 1))
                assert call(f"{url}/v1/events/main", told)[0] in (200, 202)
                wait_for(partial(settled, url, 1))
                jobs = json.loads(call(f"{url}/v1/jobs?limit=10", headers=BEARER)[2])["jobs"]
                assert [job["state"] for job in jobs] == ["done"], jobs
            written = fake.count("PUT") + fake.count("POST") + fake.count("PATCH") - writes
            assert (written > 0) == (turn == "first")
            status, listed, _ = ask(fake.host, f"team/app/referrers/{subject}?artifactType={REMAP}")
            assert status == 200
            assert [entry["artifactType"] for entry in json.loads(listed)["manifests"]] == [REMAP]
            assert fake.repo("team/app").tags == {"v1": subject}, "a tag besides that of the image"
        assert fake.count("GET", "/referrers/") > 2, "the hook did not ask the API"
        assert fake.violations == []
