(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { displaylogo: false, responsive: true };
  const NARROW = 560, SMALL = 11, CUT = 22, MOST_TICKS = 7, LEGEND_ROW = 17;

  // In a narrow window, hide the colour bar and shorten long names to leave room for the plot.
  const slim = (figure) => {
    const { data, layout } = structuredClone(figure);
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      layout[key].tickfont = { ...layout[key].tickfont, size: SMALL };
      if (layout[key].title) layout[key].title.font = { size: SMALL + 1 };
      if (key[0] === "y" && layout[key].ticktext)
        layout[key].ticktext = layout[key].ticktext.map((t) => (t.length > CUT ? t.replace(/^(.{10}).*(.{10})$/, "$1…$2") : t));
      const { range, dtick, tickmode } = layout[key];
      if (tickmode === "linear" && range && (range[1] - range[0]) / dtick > MOST_TICKS) layout[key].dtick *= 2;
    }
    if (layout.coloraxis) layout.coloraxis.showscale = false;
    for (const trace of data) {
      if (trace.type === "heatmap") trace.showscale = false;
      if (trace.mode === "text") {
        trace.textfont.size = SMALL;
        trace.text = trace.text.map((text) => text.split(" ± ")[0]);
      }
    }
    layout.font = { ...layout.font, size: SMALL + 1 };
    layout.legend.font = { size: SMALL };
    if (layout.showlegend) layout.height += LEGEND_ROW * data.filter((trace) => trace.name && trace.showlegend !== false).length;
    return { data, layout };
  };

  const draw = (theme) => {
    for (const place of document.querySelectorAll("[data-figure]")) {
      const whole = figures[place.dataset.figure][theme];
      const isNarrow = place.clientWidth < NARROW;
      const { data, layout } = isNarrow ? slim(whole) : structuredClone(whole);
      place.style.height = `${layout.height}px`;
      Plotly.react(place, data, layout, { ...config, displayModeBar: isNarrow ? false : "hover" });
    }
  };
  const print = matchMedia("print");
  const redraw = () => draw(dark.matches && !print.matches ? "dark" : "light");
  redraw();
  for (const media of [dark, print]) media.addEventListener("change", redraw);
  addEventListener("beforeprint", () => draw("light"));
  addEventListener("afterprint", redraw);
  let wasNarrow = innerWidth < NARROW + 40;
  addEventListener("resize", () => {
    const isNarrow = innerWidth < NARROW + 40;
    if (isNarrow !== wasNarrow) redraw();
    wasNarrow = isNarrow;
  });

  const table = document.getElementById("neurons");
  if (!table) return;
  const FIRST = 25;
  const bodies = [...table.tBodies];
  const count = document.getElementById("shown");
  const search = document.getElementById("search");
  const more = document.getElementById("more");
  const texts = new Map(bodies.map((body) => [body, body.textContent.toLowerCase()]));
  let all = false;

  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0, shown = 0;
    for (const body of table.tBodies) {
      const fits = words.every((word) => texts.get(body).includes(word));
      n += fits;
      body.hidden = !fits || !(all || n <= FIRST);
      shown += !body.hidden;
    }
    count.textContent = `${shown} of ${n} ${words.length ? "matching neurons" : "neurons"} shown`;
    more.hidden = n <= FIRST;
    more.textContent = all ? `Show the first ${FIRST}` : `Show all ${n}`;
  };

  const sort = (head) => {
    const column = head.cellIndex;
    const falling = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = (body) => body.rows[0].cells[column].dataset.value ?? body.rows[0].cells[column].textContent.trim();
    const isNumber = head.dataset.kind === "number";
    const compare = (a, b) => {
      if (!isNumber) return a.localeCompare(b, "en", { numeric: true });
      const [x, y] = [a, b].map((text) => (text === "" ? NaN : Number(text)));
      return Number.isNaN(x) || Number.isNaN(y) ? 0 : x - y;
    };
    const empty = (body) => isNumber && value(body) === "";
    const sorted = [...table.tBodies].sort((a, b) => empty(a) - empty(b) || (falling ? -1 : 1) * compare(value(a), value(b)));
    table.append(...sorted);
    show();
  };

  for (const head of table.tHead.rows[0].cells) head.querySelector("button")?.addEventListener("click", () => sort(head));
  table.addEventListener("click", (event) => {
    const button = event.target.closest("button[aria-controls]");
    if (!button) return;
    const card = document.getElementById(button.getAttribute("aria-controls"));
    card.hidden = !card.hidden;
    button.setAttribute("aria-expanded", String(!card.hidden));
  });
  search.addEventListener("input", show);
  more.addEventListener("click", () => { all = !all; show(); });
  show();
})();
