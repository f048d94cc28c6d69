"""Images are read in processes of their own: alike, in bounded time, and whatever becomes of such a process."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from PIL import Image

from bagel.arguments import for_command_line
from bagel.errors import Busy, ConfigError, InvalidImage
from bagel.images import VAE_TRANSFORM, VIT_TRANSFORM, ResizedImage, frames, load_image, pixels_file, prepare
from bagel.images.jpeg import MAX_SCANS
from bagel.images.pool import ImagePool
from bagel.images.recent import RecentImages
from bagel.images.transforms import PreparedImage
from bagel.images.worker import MEMORY_BYTES, NICENESS
from bagel.images.worker_process import Part

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

LIMIT_S = 60


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A JPEG of as many scans as are allowed and 36 megapixels: seconds of work in few bytes."""
    data = encoded(Image.new("RGB", (6000, 6000), "red"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scans = data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * (MAX_SCANS - scans) + data[-2:]


SMALL = encoded(Image.effect_mandelbrot((80, 50), (-2, -1, 1, 1), 30).convert("RGB"), "PNG")
BIGGER = encoded(Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 30).convert("RGB"), "PNG")


def with_pool(test: Callable[[ImagePool], Awaitable[None]], workers: int = 1, **limits: float) -> None:
    async def main() -> None:
        pool = ImagePool(workers, **limits)
        try:
            async with asyncio.timeout(LIMIT_S):
                await test(pool)
        finally:
            await pool.close()

    asyncio.run(main())
    assert not workers_of_this_process()


def workers_of_this_process() -> list[int]:
    """The ids of the workers that this process has started and that still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (process / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if b"bagel.images.worker" in command and int(parent) == os.getpid() and state != "Z":
            found.append(int(process.name))
    return found


async def resized(pool: ImagePool, data: bytes, *, for_generation: bool = True) -> ResizedImage:
    return await pool.resized(data, VAE_TRANSFORM, VIT_TRANSFORM, for_generation=for_generation, for_understanding=True)


def test_reads_as_this_process_does() -> None:
    async def test(pool: ImagePool) -> None:
        assert await pool.size(SMALL) == (80, 50)
        for for_generation in (True, False):
            made, own = await resized(pool, SMALL, for_generation=for_generation), load_image(SMALL)
            wanted = prepare(own, for_generation=for_generation)
            assert (made.size, made.prepared.size) == (own.size, wanted.size)
            for ours, theirs in ((made.prepared.vae, wanted.vae), (made.prepared.vit, wanted.vit)):
                assert (ours is None) == (theirs is None)
                assert ours is None or theirs is None or ours.tobytes() == theirs.tobytes()
            assert made.prepared.vit_digest == wanted.vit_digest
            assert not for_generation or made.prepared.vae_digest == wanted.vae_digest
        with pytest.raises(InvalidImage, match="no intact PNG"):
            await pool.size(b"<!DOCTYPE html>")
        with pytest.raises(InvalidImage, match="0 bytes"):
            await pool.size(b"")
        assert len(workers_of_this_process()) == 1

    with_pool(test, timeout_s=30.0)


def test_what_the_vae_takes_comes_before_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    told, early = frames.receive, list[Image.Image]()

    async def receive(reader: asyncio.StreamReader) -> dict[str, object]:
        answer = await told(reader)
        if answer.get("part") == "vit":  # which waits here until the other has gone its way
            while not early:
                await asyncio.sleep(0.01)
        return answer

    monkeypatch.setattr(frames, "receive", receive)

    async def test(pool: ImagePool) -> None:
        purposes = {"for_generation": True, "for_understanding": True}
        whole = await pool.resized(SMALL, VAE_TRANSFORM, VIT_TRANSFORM, **purposes, on_vae=early.append)
        [first] = early
        assert first is whole.prepared.vae and whole.prepared.vit is not None
        await pool.resized(SMALL, VAE_TRANSFORM, VIT_TRANSFORM, **purposes, on_vae=early.append)
        assert len(early) == 1  # it was not read again
        pool._recent = RecentImages()
        again = await pool.resized(SMALL, VAE_TRANSFORM, VIT_TRANSFORM, **purposes, on_vae=early.append)
        assert again.prepared.vae is not whole.prepared.vae and len(early) == 1  # its K/V may be known

    with_pool(test)


@pytest.mark.parametrize("answers", [[{"part": "vae"}] * 2, [{"part": "eye"}], [{"part": ["vae"]}]])
def test_answers_that_no_worker_gives_are_no_answers(answers: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([each if not isinstance(each, dict) else {"image": (1, 1), **each} for each in answers * 2])

    async def receive(reader: asyncio.StreamReader) -> object:
        await told(reader)
        return next(said)

    told = frames.receive
    monkeypatch.setattr(frames, "receive", receive)

    async def test(pool: ImagePool) -> None:
        with pytest.raises(InvalidImage, match="ends the process that reads it"):
            await resized(pool, SMALL)

    with_pool(test)


def test_the_first_image_finds_a_worker_that_has_started() -> None:
    async def test(pool: ImagePool) -> None:
        await pool.start()
        (started,) = workers_of_this_process()
        await pool.size(SMALL)
        assert workers_of_this_process() == [started]

    with_pool(test, workers=2)


def test_an_image_that_comes_again_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = ImagePool._read, list[int]()

    async def counted(pool: ImagePool, task: dict[str, object], data: bytes, on_part: Callable[[Part], None]) -> object:
        reads.append(len(data))
        return await read(pool, task, data, on_part)

    monkeypatch.setattr(ImagePool, "_read", counted)

    async def test(pool: ImagePool) -> None:
        async def resized(data: bytes, *, edit: bool = True) -> ResizedImage:
            return await pool.resized(data, VAE_TRANSFORM, VIT_TRANSFORM, for_generation=edit, for_understanding=True)

        first, second = await asyncio.gather(resized(SMALL), resized(SMALL))
        assert first is second is await resized(bytes(SMALL)) and len(reads) == 1
        assert (await resized(SMALL, edit=False)).prepared.vae is None and len(reads) == 2
        other = encoded(Image.new("RGB", (80, 50), "navy"), "PNG")
        assert (await resized(other)).prepared.vit_digest != first.prepared.vit_digest and len(reads) == 3
        for _ in range(2):  # what is refused is not kept, and keeps nobody waiting
            with pytest.raises(InvalidImage):
                await resized(b"no image")
        assert len(reads) == 5 and not pool._recent._reading

    with_pool(test, workers=2)


def test_recent_images_are_bounded() -> None:
    recent = RecentImages(max_bytes=3 * 4 * 100)
    images = [ResizedImage((10, 10), PreparedImage((10, 10), Image.new("RGB", (10, 10)), None)) for _ in range(4)]
    for key, image in enumerate(images[:3]):
        recent.put(key, image)
    assert recent.get(0) is images[0]  # used, so that it stays
    recent.put(3, images[3])
    assert [recent.get(key) is not None for key in range(4)] == [True, False, True, True]
    recent.put(5, ResizedImage((99, 99), PreparedImage((99, 99), Image.new("RGB", (99, 99)), None)))
    assert recent.get(5) is None and recent.get(3) is images[3]


def test_a_bomb_is_refused_in_time_and_the_next_image_is_read() -> None:
    async def test(pool: ImagePool) -> None:
        assert await pool.size(bomb()) == (6000, 6000)  # which takes no decoding
        with pytest.raises(InvalidImage, match=r"more than 2 s to read, the service's image_timeout"):
            await resized(pool, bomb())
        assert (await resized(pool, SMALL)).size == (80, 50)

    with_pool(test, timeout_s=2.0, wait_s=30.0)


def test_whoever_leaves_ends_the_decoding() -> None:
    async def test(pool: ImagePool) -> None:
        await pool.size(SMALL)
        [worker] = workers_of_this_process()
        reading = asyncio.create_task(resized(pool, bomb()))
        await asyncio.sleep(0.3)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert worker not in workers_of_this_process()
        assert await pool.size(SMALL + b"another file") == (80, 50)

    with_pool(test)


def test_the_size_of_a_file_that_came_lately_is_known() -> None:
    async def test(pool: ImagePool) -> None:
        assert await pool.size(SMALL) == (80, 50)
        for worker in workers_of_this_process():
            os.kill(worker, signal.SIGSTOP)  # nobody could read it now
        async with asyncio.timeout(5):
            assert await pool.size(SMALL) == (80, 50)

    with_pool(test)


def test_a_worker_that_was_killed_is_replaced() -> None:
    async def test(pool: ImagePool) -> None:
        await pool.size(SMALL)
        [idle] = workers_of_this_process()
        os.kill(idle, signal.SIGKILL)
        assert await pool.size(SMALL + b"another file") == (80, 50)
        reading = asyncio.create_task(resized(pool, encoded(Image.new("RGB", (4000, 4000)), "PNG")))
        await asyncio.sleep(0.1)
        for busy in workers_of_this_process():
            os.kill(busy, signal.SIGKILL)
        assert (await reading).size == (4000, 4000)

    with_pool(test)


def test_no_more_workers_than_allowed_and_no_endless_wait() -> None:
    async def test(pool: ImagePool) -> None:
        data = bomb()
        # Two files: a second call for the same one would wait for the first.
        reading = [asyncio.create_task(resized(pool, data + bytes(i))) for i in range(2)]
        await asyncio.sleep(0.2)
        with pytest.raises(Busy, match="all 2 processes that read images are busy"):
            await pool.size(SMALL)
        assert len(workers_of_this_process()) == 2
        for each in reading:
            each.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    with_pool(test, workers=2, wait_s=0.2)


def test_a_file_of_pixels_keeps_no_more_than_it_may() -> None:
    file = pixels_file.make()
    try:
        for pixels, at in ((b"abc", 0), (b"", 3), (b"defg", 3)):
            pixels_file.write(file, pixels, at)
        assert (pixels_file.read(file, 7, 0), pixels_file.read(file, 9, 3)) == (b"abcdefg", b"defg")
        pixels_file.trim(file)
        assert os.fstat(file).st_size == 7
        pixels_file.write(file, b"more", pixels_file.KEPT_BYTES)
        assert pixels_file.read(file, 9, pixels_file.KEPT_BYTES - 1) == b"\0more"
        pixels_file.trim(file)
        assert os.fstat(file).st_size == 0
    finally:
        os.close(file)


def test_no_descriptor_is_left_when_workers_have_ended() -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def test(pool: ImagePool) -> None:
        await pool.start()
        await resized(pool, SMALL)
        [worker] = workers_of_this_process()
        os.kill(worker, signal.SIGKILL)
        while workers_of_this_process():
            await asyncio.sleep(0.01)
        assert (await resized(pool, BIGGER)).size == (90, 60)

    with_pool(test)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("claimed", [(2**20, 2**20), (0, 10), (-1, -1), (8000, 8000)])
def test_a_worker_that_claims_other_pixels_than_it_has_written_is_no_worker(
    claimed: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a hostile file has taken over: the service must not allocate what it says."""
    told = frames.receive

    async def receive(reader: asyncio.StreamReader) -> dict[str, object]:
        return {**await told(reader), "image": claimed}

    monkeypatch.setattr(frames, "receive", receive)

    async def test(pool: ImagePool) -> None:
        with pytest.raises(InvalidImage, match="ends the process that reads it"):
            await resized(pool, SMALL)

    with_pool(test)


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    worker = subprocess.Popen([sys.executable, "-m", "bagel.images.worker", "1"], stdin=subprocess.PIPE)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(LIMIT_S) == 0


def test_a_worker_is_light_and_bounded() -> None:
    """It imports Pillow alone, has only so much memory, and gives way to the services beside it."""
    code = "import sys, bagel.images.worker as w; print(*[m for m in ('torch', 'numpy', 'grpc') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""

    async def test(pool: ImagePool) -> None:
        await pool.size(SMALL)
        [worker] = workers_of_this_process()
        assert 0 < resource.prlimit(worker, resource.RLIMIT_AS)[0] <= MEMORY_BYTES  # none is -1
        assert os.getpriority(os.PRIO_PROCESS, worker) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)

    with_pool(test)


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (1, 0.0), (1, float("inf")), (1, float("nan"))])
def test_limits_are_checked(workers: int, timeout_s: float) -> None:
    with pytest.raises(ConfigError, match=r"^image_") as refused:
        ImagePool(workers, timeout_s)
    flag = "--image-workers" if workers < 1 else "--image-timeout"
    assert for_command_line(refused.value).startswith(f"{flag} is ")
