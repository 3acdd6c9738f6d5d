"""A contact sheet of what `fluxfire.tune` made: baseline, each threshold that was tried, and the differences.

    sheet = ContactSheet("tuning")
    setting = fluxfire.tune(pipe, prompts, max_error=0.02, on_trial=sheet)
    sheet.save(setting)   # tuning/sheet.png, tuning/sheet.html

Pictures are written to the folder as they come, and none is kept in memory. The PNG shows the worst prompts first, a
row of pictures and below it a row of differences, `DIFFERENCE` times as bright. The page shows all prompts; a
picture under the pointer turns into its baseline, so that the eye sees what moves. The page is one file beside its
pictures and fetches nothing.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from fluxfire import Setting, Trial
from fluxfire.demo.show import DIFFERENCE, difference

ROWS: Final = 8  # prompts in the PNG

_CELL_PX, _GAP_PX, _LINE_PX, _HEAD_PX = 192, 10, 20, 64
_PAPER, _INK, _FAINT, _CHOSEN = (255, 255, 255), (20, 20, 20), (110, 110, 110), (42, 157, 143)


class ContactSheet:
    """An `on_trial` for `fluxfire.tune`.

    Args:
        folder: where the pictures and the sheet go; made if it is not there.
        names: what each prompt is called; else by its number.
    """

    def __init__(self, folder: str | PathLike[str], names: list[str] | None = None) -> None:
        self.folder = Path(folder)
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        self._names = names or []
        self._trials: dict[tuple[int, float], Trial] = {}

    def __call__(self, trial: Trial) -> None:
        """Writes a trial's (first) picture."""
        trial.pictures[0].convert("RGB").save(self.folder / _file(trial.prompt, trial.threshold))
        self._trials[trial.prompt, trial.threshold] = replace(trial, pictures=())

    def save(self, setting: Setting) -> list[Path]:
        """Writes sheet.png and sheet.html; returns their paths."""
        png, page = self.folder / "sheet.png", self.folder / "sheet.html"
        self._draw(setting).save(png)
        page.write_text(self._page(setting), encoding="utf-8")
        return [png, page]

    def _columns(self) -> list[float]:
        return sorted({threshold for _, threshold in self._trials})

    def _rows(self, setting: Setting) -> list[int]:
        """The prompts, the one with the largest error at the threshold that was found first."""
        prompts = {prompt for prompt, _ in self._trials}
        return sorted(prompts, key=lambda prompt: -self._trials[prompt, setting.threshold].error)

    def _name(self, prompt: int) -> str:
        return self._names[prompt] if prompt < len(self._names) else f"prompt {prompt}"

    def _heads(self, setting: Setting) -> Iterator[tuple[float, str, str]]:
        """Every column's threshold, its name and what became of it."""
        for threshold in self._columns():
            chosen = threshold == setting.threshold
            mine = [trial for (_, other), trial in self._trials.items() if other == threshold]
            saved = 1 - sum(trial.computed for trial in mine) / sum(trial.calls for trial in mine)
            told = f"{saved:.0%} saved, {len(mine)} of {setting.prompts}"
            yield threshold, f"{threshold:g}" if threshold else "baseline", ("found: " if chosen else "") + told

    def _draw(self, setting: Setting) -> Image.Image:
        columns, rows = self._columns(), self._rows(setting)[:ROWS]
        row_px = 2 * _CELL_PX + 3 * _LINE_PX + _GAP_PX
        size = (_GAP_PX + len(columns) * (_CELL_PX + _GAP_PX), _HEAD_PX + len(rows) * row_px)
        sheet = Image.new("RGB", (max(size[0], 640), size[1]), _PAPER)
        draw = ImageDraw.Draw(sheet)
        large, small = ImageFont.load_default(15), ImageFont.load_default(12)
        draw.text((_GAP_PX, 4), str(setting), _INK, large)
        for index, (threshold, name, told) in enumerate(self._heads(setting)):
            x = _GAP_PX + index * (_CELL_PX + _GAP_PX)
            ink = _CHOSEN if threshold == setting.threshold else _INK
            draw.text((x, 25), name, ink, large)
            draw.text((x, 44), told if threshold else f"differences {DIFFERENCE} times as bright", ink, small)
            for row, prompt in enumerate(rows):
                y = _HEAD_PX + row * row_px
                if not index:
                    draw.text((x, y), self._name(prompt), _INK, large)
                if trial := self._trials.get((prompt, threshold)):
                    self._cell(sheet, trial, x, y + _LINE_PX)
                    draw.text((x, y + _LINE_PX + _CELL_PX + 2), _numbers(trial), _FAINT, small)
        return sheet

    def _cell(self, sheet: Image.Image, trial: Trial, x: int, y: int) -> None:
        """A picture, and below it its difference to the baseline; both whole, in a square."""
        with (
            Image.open(self.folder / _file(trial.prompt, trial.threshold)) as mine,
            Image.open(self.folder / _file(trial.prompt, 0.0)) as first,
        ):
            shown = [mine.convert("RGB")] + [difference(first, mine)] * (trial.threshold > 0)
        for index, picture in enumerate(shown):
            scale = _CELL_PX / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, y + index * (_CELL_PX + _LINE_PX)))

    def _page(self, setting: Setting) -> str:
        heads = "".join(
            f'<th class="{"found" if threshold == setting.threshold else ""}">{html.escape(name)}<br><small>'
            f"{html.escape(told)}</small></th>"
            for threshold, name, told in self._heads(setting)
        )
        body = []
        for prompt in self._rows(setting):
            cells = "".join(self._html_cell(prompt, threshold) for threshold in self._columns())
            body.append(f'<tr><th class="name">{html.escape(self._name(prompt))}</th>{cells}</tr>')
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fluxfire tune</title><style>{_STYLE}</style>'
            f"<h1>{html.escape(str(setting))}</h1><p>A picture under the pointer turns into its baseline. Below: the "
            f"difference, {DIFFERENCE} times as bright. Empty: given up before, since the budget was out of reach.</p>"
            f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></html>\n"
        )

    def _html_cell(self, prompt: int, threshold: float) -> str:
        trial = self._trials.get((prompt, threshold))
        if trial is None:
            return "<td></td>"
        mine, first = _file(prompt, threshold), _file(prompt, 0.0)
        alt = f"{html.escape(self._name(prompt))} at {threshold:g}"
        under = f'<img src="{first}" alt=""><img class="top" src="{mine}" alt="{alt}" loading="lazy">'
        shown = f'<a class="pair" href="{mine}">{under}</a>'
        if threshold:
            shown += f'<div class="difference"><img src="{first}" alt=""><img class="over" src="{mine}" alt=""></div>'
        return f"<td>{shown}<small>{_numbers(trial)}</small></td>"


def _file(prompt: int, threshold: float) -> str:
    return f"pictures/{prompt:03d}-{threshold:g}.png"


def _numbers(trial: Trial) -> str:
    calls = f"{trial.computed} of {trial.calls} calls"
    return f"{calls}, error {trial.error:.2%}" if trial.threshold else calls


_STYLE: Final = f"""
body {{ font: 15px system-ui, sans-serif; margin: 1.5rem; color: #141414; background: #fff }}
h1 {{ font-size: 1.1rem }} small {{ color: #666; font-weight: normal }}
table {{ border-collapse: collapse }} th, td {{ padding: 4px 8px; text-align: left; vertical-align: top }}
th.found {{ color: #1f7d71; border-bottom: 3px solid #2a9d8f }} th.name {{ max-width: 10rem }}
.pair, .difference {{ position: relative; display: block; width: 200px; isolation: isolate; margin-bottom: 4px }}
img {{ width: 200px; display: block }} .top, .over {{ position: absolute; left: 0; top: 0 }}
.pair:hover .top {{ visibility: hidden }}
.difference {{ filter: brightness({DIFFERENCE}) }} .over {{ mix-blend-mode: difference }}
"""
