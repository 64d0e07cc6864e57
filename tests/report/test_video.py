import pytest
import torch

pytest.importorskip("cv2")

from tinydet.report.video import VideoFile, Window, open_video


def _frames(count, size=(96, 128)):
    """Frame i is red in its first i rows of 16 pixels and blue below."""
    frames = torch.zeros(count, 3, *size, dtype=torch.uint8)
    for i, frame in enumerate(frames):
        frame[0, : 16 * i], frame[2, 16 * i :] = 255, 255
    return frames


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
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


def test_a_window_where_opencv_has_none(monkeypatch):
    import cv2

    def none(*_):
        raise cv2.error("not implemented")

    monkeypatch.setattr(cv2, "namedWindow", none)
    with pytest.raises(ValueError, match=r"opens no windows.*--out FILE"):
        Window("camera 0")
