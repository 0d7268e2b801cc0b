"""Tables for people, figures and the files they become: content, never pixels."""
import hashlib
import io
import json

import matplotlib.colors as colors
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from test_statistics import GOOD, LATER, THRESHOLDS, evaluation

from saferule import figures, report
from saferule.errors import UserError


@pytest.fixture(scope="module")
def tables():
    episodes, runs = evaluation(GOOD)
    tidy = report.main_table(episodes, runs)
    later = report.later_table(*evaluation(LATER, stage="later"))
    return tidy, later, report.claims(tidy, later, THRESHOLDS)


@pytest.fixture(scope="module")
def curves():
    """Two attacks, two methods, two seeds, four snapshots; the budget ends at step 400."""
    parts = []
    for attack in ("label_flip", "inject"):
        for step, cost in ((0, 60), (200, 30), (400, 10), (800, 5)):
            values = {(attack, m): (step, [(500 + step, cost + k), (520 + step, cost + 4)])
                      for k, m in enumerate(("saferule", "finetune"))}
            parts.append(evaluation(values, stage="curve")[0])
        final = {(attack, "saferule"): (400, [(500, 10), (520, 14)]), (attack, "finetune"): (400, [(500, 10), (520, 14)]),
                 (attack, "retrain"): (4000, [(590, 2), (610, 4)])}
        parts.append(evaluation(final)[0])
    return pd.concat(parts)


def lines_at(ax, value, axis):
    return [l for l in ax.lines if len(l.get_xdata()) == 2 and np.allclose(getattr(l, f"get_{axis}data")(), value)]


def texts(fig):
    return [t.get_text() for t in [*fig.texts, *(t for ax in fig.axes for t in ax.texts)]]


def test_every_method_has_its_own_label_colour_and_marker():
    assert set(figures.COLOURS) == set(figures.MARKERS) == set(report.METHODS)
    for mapping in (figures.COLOURS, figures.MARKERS, report.METHODS):
        assert len(set(mapping.values())) == len(mapping)


def test_summary_table_says_it_in_words(tables):
    table = report.summary_table(*tables[:2]).set_index("method")
    own = table.loc["Safe-RULE"]
    assert own["return [95%]"] == "490 [480, 500]"
    assert (own["cost per seed"], own["safe seeds"], own["cost per seed, later"]) == ("0/12", "2/2", "2/19")
    assert (own["of retrained return"], own["safety recovered"], own["of retraining steps"]) == ("82%", "88%", "10%")
    assert table.loc["Clean data", "attack"] == "no attack" and table.loc["Clean data", "of retraining steps"] == "–"
    assert "cost per seed, later" not in report.summary_table(tables[0])


def test_markdown_is_a_table_with_every_cell():
    assert report.to_markdown(pd.DataFrame({"a|b": ["0/1"], "n": [2]})) == "| a\\|b | n |\n| --- | --- |\n| 0/1 | 2 |\n"


def test_claims_table_shows_value_bound_and_verdict(tables):
    table = report.claims_table(tables[2])
    line = table[table.claim.str.contains("80%")].iloc[0]
    assert (line["judged"], line["bound"], line["verdict"], line["every seed"]) == ("0.817", "≥ 0.8", "supported", "0.83/0.8")


def test_curve_figure(curves):
    fig = report.curve_figure(curves, 20.0)
    cost, other, ret, _ = fig.axes
    assert [ax.get_title(loc="left") for ax in (cost, other)] == ["injection", "label flip"]
    assert (cost.get_ylabel(), ret.get_ylabel()) == (figures.COST, figures.RETURN) and "updates" in ret.get_xlabel()
    for ax in (cost, other):
        assert len(lines_at(ax, 20, "y")) == 1 and "cost limit 20" in [t.get_text() for t in ax.texts]
    (level,) = [l for l in lines_at(ret, 600, "y") if l.get_linestyle() == "--"]
    assert colors.same_color(level.get_color(), figures.COLOURS["retrain"])
    drawn = {l.get_label(): l for l in cost.lines if not l.get_label().startswith("_")}
    assert list(drawn) == ["Fine-tuning", "Safe-RULE"]   # METHODS' order
    np.testing.assert_allclose(drawn["Safe-RULE"].get_ydata(), [62, 32, 12, 7])          # means over seeds
    assert colors.same_color(drawn["Safe-RULE"].get_color(), figures.COLOURS["saferule"])
    thin = [l for l in cost.lines if l.get_linewidth() < 1 and colors.same_color(l.get_color(), figures.COLOURS["saferule"])]
    assert len(thin) == 2                                # every seed is seen
    assert any("further ordinary training" in t for t in texts(fig))


def test_curve_figure_labels_lie_clear_of_each_other(curves):
    fig = report.curve_figure(curves, 20.0)
    renderer = FigureCanvasAgg(fig).get_renderer()
    for ax in fig.axes:
        boxes = [t.get_window_extent(renderer) for t in ax.texts if t.get_text() in report.METHODS.values()]
        assert len(boxes) == 3
        assert all(box.x1 <= fig.bbox.x1 for box in boxes)
        text = [t.get_tightbbox(renderer) for t in ax.texts if t.get_text() in report.METHODS.values()]
        heights = sorted((b.y0 + b.y1) / 2 for b in text)
        assert min(np.diff(heights)) > 8


def test_curve_figure_refuses_mixtures_and_missing_curves(curves):
    with pytest.raises(UserError, match="2 pairs of task and learner"):
        report.curve_figure(pd.concat([curves, curves.assign(task="CarRun")]), 20.0)
    with pytest.raises(UserError, match="none of stage 'curve'"):
        report.curve_figure(curves[curves.stage == "final"], 20.0)


def test_spread_keeps_order_and_distance():
    out = figures.spread([0.5, 0.5, 0.52, 0.9], 0.1)
    assert np.allclose(np.sort(np.diff(sorted(out)))[:2], 0.1) and out[3] == 0.9
    assert out[0] < out[1] < out[2] and np.mean(out[:3]) == pytest.approx(np.mean([0.5, 0.5, 0.52]))
    assert min(figures.spread([0, 0, 0], 0.1)) >= 0.02


def test_scatter_figure_shows_the_lie_and_the_truth():
    clean = pd.DataFrame({"episode": [0, 1, 2], "origin": 0, "ret": [100.0, 500.0, 300.0], "cost": [0.0, 60.0, 5.0]})
    flipped = pd.DataFrame({"episode": [0, 1, 2], "origin": [0, 1, 0], "ret": [100.0, 500.0, 300.0], "cost": [0.0, 0.0, 5.0]})
    added = pd.concat([clean, pd.DataFrame({"episode": [3], "origin": [1], "ret": [900.0], "cost": [0.0]})])
    fig = report.scatter_figure({"inject": added, "label_flip": flipped}, clean, 20.0)
    inject, flip = fig.axes
    assert flip.get_title(loc="left") == "label flip: 1 of 3 episodes poisoned"
    honest, truth, forged = (c.get_offsets() for c in flip.collections[:3])
    assert len(honest) == 2 and truth.tolist() == [[60, 500]] and forged.tolist() == [[0, 500]]
    (link,) = [l for l in flip.lines if list(l.get_xdata()) == [60, 0]]
    assert list(link.get_ydata()) == [500, 500]
    assert len(inject.collections[1].get_offsets()) == 0             # nobody knows where an injected episode really lies
    assert all(len(lines_at(ax, 20, "x")) == 1 for ax in fig.axes)
    assert {ax.get_xlabel() for ax in fig.axes} == {figures.COST} and inject.get_ylabel() == figures.RETURN
    labels = [t.get_text() for t in fig.legends[0].get_texts()]
    assert labels == ["honest episode", "poisoned episode, as labelled", "poisoned episode, what really happened"]


def test_scatter_figure_takes_a_known_truth():
    clean = pd.DataFrame({"episode": [0], "ret": [1.0], "cost": [0.0]})
    added = pd.DataFrame({"episode": [0, 9], "origin": [0, 1], "ret": [1.0, 9.0], "cost": [0.0, 0.0],
                          "true_ret": [np.nan, 7.0], "true_cost": [np.nan, 55.0]})
    ax = report.scatter_figure({"inject": added}, clean, 20.0).axes[0]
    assert ax.collections[1].get_offsets().tolist() == [[55, 7]]


def test_pareto_figure(tables):
    fig = report.pareto_figure(tables[0])
    (ax,) = fig.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == (figures.COST, figures.RETURN, "BallCircle, injection")
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["Clean data", "Poisoned", "Retrained", "Safe-RULE"]
    assert len(lines_at(ax, 20, "x")) == 1
    means = {tuple(l.get_xydata()[0]): l for l in ax.lines if len(l.get_xdata()) == 1}
    assert colors.same_color(means[(6, 490)].get_color(), figures.COLOURS["saferule"])
    assert set(means) == {(1.5, 590), (50, 710), (0, 600), (6, 490)}


def test_training_figure():
    history = pd.DataFrame([{"step": t, "name": n, "attack": a, "method": m, "seed": s, "value": t + s}
                            for t in (1, 2) for n in ("critic", "lam") for a, m in (("none", "clean"), ("inject", "poisoned"))
                            for s in (0, 2)])
    fig = report.training_figure(history)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["critic", "lam"]
    assert all("updates" in ax.get_xlabel() for ax in fig.axes)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["Clean data", "Poisoned, injection"]
    mean = [l for l in fig.axes[0].lines if l.get_linewidth() > 1 and colors.same_color(l.get_color(), figures.COLOURS["clean"])]
    np.testing.assert_allclose(mean[0].get_ydata(), [2, 3])
    assert len(fig.axes[0].lines) == 2 * 3
    assert len(report.training_figure(history, ["lam"]).axes) == 1
    bare = report.training_figure(history[["step", "name", "value"]].drop_duplicates(["step", "name"]))
    assert len(bare.axes[0].lines) == 1 and not bare.legends
    with pytest.raises(UserError, match="no values of actor"):
        report.training_figure(history, ["actor"])


def test_figures_are_files_with_the_same_bytes_each_time(curves, tmp_path):
    first = report.save_figure(report.curve_figure(curves, 20.0), tmp_path / "F1")
    assert [p.name for p in first] == ["F1.png", "F1.svg"]
    again = report.save_figure(report.curve_figure(curves, 20.0), tmp_path / "again" / "F1")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    with Image.open(first[0]) as image:
        assert round(image.info["dpi"][0]) == 150
    assert b"<svg" in first[1].read_bytes() and b"dc:date" not in first[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["F1.png", "F1.svg", "again"]               # nothing left behind


def test_figures_leave_no_global_state(tables):
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    before = dict(mpl.rcParams)
    report.pareto_figure(tables[0])
    assert dict(mpl.rcParams) == before and not plt.get_fignums()


def test_table_figure_holds_every_cell_inside_the_picture(tables):
    shown = report.summary_table(*tables[:2])
    fig = report.table_figure(shown, "T1 main", "a note", "smoke run, not a result")
    said = texts(fig)
    assert {"T1 main", "a note", "smoke run, not a result", "490 [480, 500]", "0/12", *report.METHODS.values()} - set(said) == (
        set(report.METHODS.values()) - set(shown.method))
    renderer = FigureCanvasAgg(fig).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in fig.texts]
    assert all(0 <= b.x0 and b.x1 <= fig.bbox.x1 and 0 <= b.y0 and b.y1 <= fig.bbox.y1 for b in boxes)
    own = next(t for t in fig.texts if t.get_text() == "Safe-RULE")
    assert own.get_color() == figures.COLOURS["saferule"]


def test_write_table(tables, tmp_path):
    tidy, later, verdicts = tables
    paths = report.write_table(tidy, tmp_path / "T1_main", "T1: main", "Ours, not the paper's.", "smoke", ["b" * 64, "a" * 64],
                               report.summary_table(tidy, later), report.claims_table(verdicts))
    assert [p.name for p in paths] == ["T1_main.csv", "T1_main.md", "T1_main.png", "manifest.json"]
    back = pd.read_csv(paths[0], keep_default_na=False)
    assert list(back.columns) == list(tidy.columns)
    assert np.array_equal(back.return_norm, tidy.return_norm)        # to the last bit
    text = paths[1].read_text()
    for words in ("# T1: main", "smoke run, not a result", "490 [480, 500]", "| supported |", "Ours, not the paper's."):
        assert words in text
    with Image.open(io.BytesIO(paths[2].read_bytes())) as image:
        assert image.width > 600
    manifest = json.loads(paths[3].read_text())
    assert manifest["profile"] == "smoke" and manifest["tables"]["T1_main"]["inputs"] == ["a" * 64, "b" * 64]
    assert manifest["tables"]["T1_main"]["files"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths[:3]}
    assert "smoke run, not a result" in manifest["tables"]["T1_main"]["note"]


def test_tables_share_a_manifest_and_real_runs_carry_no_warning(tables, tmp_path):
    for stem in ("T2_rate", "T1_main"):
        paths = report.write_table(tables[0], tmp_path / stem, "T", profile="quick")
    assert list(json.loads(paths[-1].read_text())["tables"]) == ["T1_main", "T2_rate"]
    assert "smoke" not in paths[1].read_text()


def test_write_table_into_a_file_says_so(tables, tmp_path):
    (tmp_path / "tables").write_text("in the way")
    with pytest.raises(UserError):
        report.write_table(tables[0], tmp_path / "tables" / "T1_main", "T")
