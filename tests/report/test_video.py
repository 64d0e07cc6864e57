import resource

import pytest
import torch

pytest.importorskip("cv2")

from tinydet.report.video import VideoFile, open_video


def _frames(count, size=(96, 128)):
    """Frame i is red in its first i rows of 16 pixels and blue below."""
    frames = torch.zeros(count, 3, *size, dtype=torch.uint8)
    for i, frame in enumerate(frames):
        frame[0, : 16 * i], frame[2, 16 * i :] = 255, 255
    return frames


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.webm"])
def test_what_is_written_is_read_again(tmp_path, name):
    frames = _frames(5)
    with VideoFile(tmp_path / name, 12.5) as file:
        for frame in frames:
            file.write(frame)
        assert not (tmp_path / name).exists()  # only once it is whole
    assert file.frames == 5
    video = open_video(tmp_path / name)
    assert video.frames_per_second == pytest.approx(12.5)
    assert video.frames == 5
    found = torch.stack(list(video))
    assert found.dtype == torch.uint8
    # Lossy codecs: colours within some levels. Red for blue, or a turned frame, is 255 off.
    assert (found.float() - frames.float()).abs().mean() < 12
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.webm"])
def test_an_odd_size_loses_no_row_and_no_column(tmp_path, name):
    frame = torch.zeros(3, 49, 65, dtype=torch.uint8)
    frame[0, -17:], frame[1, :, -17:] = 255, 255
    with VideoFile(tmp_path / name, 10) as file:
        file.write(frame)
    (found,) = open_video(tmp_path / name)
    assert found.shape == (3, 50, 66)
    assert (found[:, :49, :65].float() - frame.float()).abs().mean() < 12


def test_an_interrupted_video_keeps_what_was_written(tmp_path):
    def frames():
        yield _frames(1)[0]
        raise KeyboardInterrupt

    def write():
        with VideoFile(tmp_path / "a.mp4", 10) as file:
            for frame in frames():
                file.write(frame)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert len(list(open_video(tmp_path / "a.mp4"))) == 1


def test_without_a_frame_there_is_no_file(tmp_path):
    with VideoFile(tmp_path / "a.mp4", 10):
        pass
    assert not list(tmp_path.iterdir())


def test_mistakes_are_told_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="no such video file"):
        open_video(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match=r"text\.mp4: not a video that OpenCV can read"):
        open_video(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="camera 73: no such camera"):
        open_video(73)
    with pytest.raises(ValueError, match=r"a\.gif: not the name of a video; end it in \.mp4"):
        VideoFile(tmp_path / "a.gif", 10)


def test_a_frame_may_be_shown_for_longer(tmp_path):
    first, last = _frames(5)[[0, 4]]
    with VideoFile(tmp_path / "a.avi", 10) as file:
        file.write(first)
        assert file.show(last, times=3)
    assert file.frames == 4
    found = torch.stack(list(open_video(tmp_path / "a.avi"))).float()
    assert (found - torch.stack([first, last, last, last])).abs().mean() < 12


def test_frames_of_several_sizes_are_refused(tmp_path):
    with VideoFile(tmp_path / "a.avi", 10) as file:
        file.write(_frames(1)[0])
        with pytest.raises(ValueError, match="one size, not 128x96 and 96x128"):
            file.write(_frames(1, (128, 96))[0])


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 60 kB, which to a program looks like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ending", [".mp4", ".avi", ".mkv", ".webm"])
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, ending, full_disk):
    del full_disk
    path = tmp_path / f"a{ending}"
    path.write_text("before")
    noise = torch.randint(0, 256, (40, 3, 96, 128), dtype=torch.uint8)

    def write():
        with VideoFile(path, 10) as file:
            for frame in noise:
                file.write(frame)

    with pytest.raises(ValueError, match=rf"a\{ending}: incomplete: is the disk full"):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a\.mp4: OpenCV cannot write it"),
        VideoFile(tmp_path / "gone" / "a.mp4", 10) as file,
    ):
        file.write(_frames(1)[0])


@pytest.mark.parametrize(("ending", "opens"), [(".avi", True), (".mp4", False), (".webm", True)])
def test_a_video_cut_short_is_told(tmp_path, ending, opens):
    path = tmp_path / f"a{ending}"
    with VideoFile(path, 10) as file:
        for frame in torch.randint(0, 256, (40, 3, 96, 128), dtype=torch.uint8):
            file.write(frame)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    if not opens:  # An MP4 file's index is at its end.
        with pytest.raises(ValueError, match="or truncated"):
            open_video(path)
        return
    video = open_video(path)
    read = len(list(video))
    assert 0 < read < 38
    assert video.missing(read) == f"{path}: ends after {read} of 40 frames: truncated or damaged"
    assert not video.missing(40)
    assert not video.missing(39)  # What a file states is often one off.
