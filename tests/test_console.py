import logging

from tinydet.console import show_log


def remove_handlers(monkeypatch):
    """As in a program or notebook that has set up no logging; pytest sets up its own."""
    for logger in (logging.getLogger(), logging.getLogger("tinydet")):
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "level", logger.level)


def test_lines_are_printed_once(capsys, monkeypatch):
    remove_handlers(monkeypatch)
    for _ in range(2):
        show_log()
    logging.getLogger("tinydet.training.loop").info("epoch 1")
    logging.getLogger("another").info("noise")
    assert capsys.readouterr().out == "epoch 1\n"


def test_a_program_s_own_logging_decides(capsys, monkeypatch):
    remove_handlers(monkeypatch)
    logging.getLogger().addHandler(logging.NullHandler())
    show_log()
    logging.getLogger("tinydet").warning("epoch 1")
    assert capsys.readouterr() == ("", "")


def test_other_ranks_print_errors_only(capsys, monkeypatch):
    remove_handlers(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    show_log()
    logging.getLogger("tinydet").info("epoch 1")
    logging.getLogger("tinydet").error("broken")
    assert capsys.readouterr().out == "broken\n"
