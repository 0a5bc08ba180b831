"""What the grades of a side by side say: key.jsonl and filled-in sheets -> report.json, bars.png, index.html."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import krippendorff
import matplotlib
import numpy
from annotation import make_folder, shown_prompt
from matplotlib import font_manager
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size
from side_by_side_grades import GRADES, Question, read_questions

from megatron_xy.errors import UsageError
from megatron_xy.report.axes import COLOURS, finish
from megatron_xy.report.page import ReportSection, page
from megatron_xy.storage import without_non_finite, write_bytes, write_json, write_text

RESAMPLES = 2000
BAR_COLOURS = dict(zip(GRADES, (COLOURS[2], "#c9ccd1", COLOURS[1]), strict=True))
LAST_RESORT = "Last Resort High-Efficiency"  # comes with matplotlib and has a box for every character
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "SimHei", "PingFang SC")


@dataclass(frozen=True)
class Rate:
    """A share of all grades in percent, and its 95% interval."""

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.percent:.2f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Standing:
    """How the judged model stands in a group of questions."""

    questions: int
    grades: int
    good: Rate
    same: Rate
    bad: Rate
    win_and_tie: Rate  # good or same


def write_report(key: Path, sheets: Sequence[Path], folder: Path, *, num_losses: int) -> list[str]:
    """Writes the report and returns its table as lines. Raises UsageError, ConfigError, DataError or StorageError."""
    if num_losses < 0:
        raise UsageError(f"--losses ({num_losses}) must not be below 0")
    questions = read_questions(key, sheets)
    standings = {name: standing(group) for name, group in groups_of(questions).items()}
    agreement = alpha(questions)
    first = questions[0].row
    models = {side: first[side]["model"] for side in ("candidate", "baseline")}
    lost = sharpest_losses(questions, most=num_losses)
    make_folder(folder)
    found = {
        **models,
        "krippendorff_alpha": agreement,
        "groups": [
            {"domain": domain, "category": category, **asdict(it)} for (domain, category), it in standings.items()
        ],
        "sharpest_losses": [{"id": question.row["id"], "grades": question.grades} for question in lost],
    }
    write_json(folder / "report.json", without_non_finite(found))
    font = chinese_font("".join(f"{domain}{category}" for domain, category in standings))
    image = draw_bars(standings, font=font)
    write_bytes(folder / "bars.png", image)
    table = table_of(standings)
    title = f"{models['candidate']} against {models['baseline']}"
    sections = [
        ReportSection("Grades", rows=table, statements=[_agreement_told(agreement, questions), _how_counted()]),
        *(_shown_loss(question) for question in lost),
    ]
    caption = f"What annotators said of {title}, by category: good, same, bad, in percent of the grades."
    write_text(folder / "index.html", page(title, sections=sections, pictures=[(image, caption)]))
    widths = [max(cell_len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(map(set_cell_size, row, widths)).rstrip() for row in table]
    boxes = [] if font else ["no installed font has the Chinese of bars.png, which shows boxes; index.html has a table"]
    return [title, *lines, _agreement_told(agreement, questions), *boxes, f"wrote {folder / 'index.html'}"]


def groups_of(questions: Sequence[Question]) -> dict[tuple[str, str], list[Question]]:
    """{(domain, category): its questions}; all, then each domain's, have "all" in place of a name."""
    groups: dict[tuple[str, str], list[Question]] = {("all", "all"): list(questions)}
    for question in sorted(questions, key=lambda question: question.group):
        domain, category = question.group
        groups.setdefault((domain, "all"), []).append(question)
        groups.setdefault((domain, category), []).append(question)
    return groups


def standing(questions: Sequence[Question]) -> Standing:
    """Shares of all grades; intervals by bootstrap over questions, whose grades stay together."""
    counts = numpy.array([question.counts for question in questions])
    number = len(questions)
    draws = numpy.random.default_rng(0).multinomial(number, [1 / number] * number, size=RESAMPLES)
    resampled = draws.astype(float) @ counts  # of integers, a product is not computed by BLAS

    def rate(of: Sequence[int]) -> Rate:
        shares = 100 * resampled[:, of].sum(axis=1) / resampled.sum(axis=1)
        low, high = numpy.percentile(shares, (2.5, 97.5))
        return Rate(100 * float(counts[:, of].sum() / counts.sum()), float(low), float(high))

    return Standing(number, int(counts.sum()), rate([0]), rate([1]), rate([2]), rate([0, 1]))


def alpha(questions: Sequence[Question]) -> float:
    """Krippendorff's alpha of the grades as an ordinal scale; NaN where all are the same, or none is a second one."""
    annotators = sorted({name for question in questions for name in question.grades})
    places = {grade: float(place) for place, grade in enumerate(GRADES)}
    table = numpy.array(
        [[places.get(question.grades.get(name, ""), math.nan) for question in questions] for name in annotators]
    )
    if len(numpy.unique(table[numpy.isfinite(table)])) < 2 or len(questions[0].grades) < 2:
        return math.nan
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))


def sharpest_losses(questions: Sequence[Question], *, most: int) -> list[Question]:
    """Those with the most bad and the fewest good grades."""
    lost = [question for question in questions if question.counts[2] > question.counts[0]]
    return sorted(lost, key=lambda question: question.counts[0] - question.counts[2])[:most]


def table_of(standings: dict[tuple[str, str], Standing]) -> list[list[str]]:
    """Head and rows, in percent with intervals."""
    rows = [["domain", "category", "questions", *GRADES, "win and tie"]]
    for (domain, category), it in standings.items():
        rows.append(
            [domain, category, f"{it.questions:,}", str(it.good), str(it.same), str(it.bad), str(it.win_and_tie)]
        )
    return rows


def chinese_font(text: str) -> str | None:
    """The name of an installed font that has the text's Chinese; None where none has it."""
    wanted = {ord(character) for character in text if cell_len(character) > 1}
    regular = [font for font in font_manager.fontManager.ttflist if font.style == "normal" and font.name != LAST_RESORT]
    for font in sorted(regular, key=lambda font: (font.name not in CJK_FONTS, font.weight != 400, font.name)):
        if all(map(font_manager.get_font(font.fname).get_char_index, wanted)):
            return font.name
    return None


def draw_bars(standings: dict[tuple[str, str], Standing], *, font: str | None) -> bytes:
    """A stacked bar a category, the best win-and-tie rate on top, behind those of the domains and of all: PNG.

    font: for what DejaVu Sans does not have.
    """

    def order(item: tuple[tuple[str, str], Standing]) -> tuple[bool, float]:
        return item[0][1] != "all", -item[1].win_and_tie.percent

    bars = sorted(standings.items(), key=order)
    families = [name for name in ("DejaVu Sans", font) if name]
    with matplotlib.rc_context({"font.size": 11, "font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # where no font has it: told by write_report
        figure = Figure(figsize=(9, 1.4 + 0.42 * len(bars)), layout="constrained")
        axes = figure.subplots()
        places = numpy.arange(len(bars))
        left: NDArray[numpy.float64] = numpy.zeros(len(bars))
        for grade in GRADES:
            widths = numpy.array([getattr(it, grade).percent for _, it in bars])
            axes.barh(places, widths, left=left, height=0.72, color=BAR_COLOURS[grade], label=grade)
            for place, start, width in zip(places, left, widths, strict=True):
                if width >= 6:
                    axes.text(start + width / 2, float(place), f"{width:.1f}", ha="center", va="center", fontsize=9.5)
            left = left + widths
        names = [" ".join(dict.fromkeys(name)) for name, _ in bars]
        axes.set_yticks(places, names)
        axes.set_ylim(len(bars) - 0.4, -0.6)  # from the top down
        axes.set_xlim(0, 100)
        finish(axes, title="good, same, bad by category", ylabel="", xlabel="% of the grades")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, facecolor="white")
    return image.getvalue()


def _agreement_told(agreement: float, questions: Iterable[Question]) -> str:
    agreed = [len(set(question.grades.values())) == 1 for question in questions if len(question.grades) > 1]
    if not agreed:
        return "one annotator a question: there is no agreement to tell"
    value = f"{agreement:.3f}" if math.isfinite(agreement) else "none, as all grades are the same"
    share = 100 * sum(agreed) / len(agreed)
    return f"annotators agree in {share:.1f}% of the questions; Krippendorff's alpha (ordinal): {value}"


def _how_counted() -> str:
    return f"every grade counts once; 95% intervals by bootstrap over questions, {RESAMPLES:,} resamples"


def _shown_loss(question: Question) -> ReportSection:
    """A question that was lost, with both answers."""
    row = question.row
    grades = ", ".join(f"{name}: {grade}" for name, grade in question.grades.items())
    parts = [shown_prompt(row)]
    parts += [f"--- {row[side]['model']}\n{row[side]['response']}" for side in ("candidate", "baseline")]
    return ReportSection(
        f"Lost: {row['id']}, {row['domain']}, {row['category']}", statements=[grades], text="\n".join(parts)
    )
