// How charts look, and how they are saved, in reports and on the live page.
// Series colours are Okabe and Ito's, apart under every common colour blindness; on dark ground the darkest are lifted.
const Shoestring = (() => {
const THEMES = {
  light: {
    text: "#1b1d21", soft: "#4c5058", muted: "#85898f", grid: "#ecebe7", line: "#cfcdc7", card: "#ffffff",
    blue: "#0067a8", orange: "#d55e00", green: "#007e5c", purple: "#8f4a80", red: "#c2185b", yellow: "#b58900",
    series: ["#0067a8", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1b1d21", "#6600cc"],
    amount: [[0, "#f7f6f2"], [0.5, "#f0a25c"], [1, "#8a2f00"]],
    balance: [[0, "#0a4f8c"], [0.25, "#7fb2db"], [0.5, "#f1f0ec"], [0.75, "#f0a25c"], [1, "#b34700"]],
  },
  dark: {
    text: "#eceef1", soft: "#b9bec7", muted: "#7d838e", grid: "#262a30", line: "#3b4048", card: "#1a1d21",
    blue: "#6cb8f0", orange: "#f39a4a", green: "#34c883", purple: "#d79bc6", red: "#ff6f9c", yellow: "#ffd166",
    series: ["#6cb8f0", "#f39a4a", "#34c883", "#e6a3cb", "#a8d8ff", "#ffd166", "#eceef1", "#9966ff"],
    amount: [[0, "#1f2226"], [0.5, "#a55a1c"], [1, "#ffd08a"]],
    balance: [[0, "#63b3f5"], [0.25, "#2f6396"], [0.5, "#24272c"], [0.75, "#96551d"], [1, "#ff9f4a"]],
  },
};
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false, showLink: false };
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 520px)");

function theme() {
  const chosen = document.documentElement.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && prefersDark.matches) ? THEMES.dark : THEMES.light;
}
function paint(value, theme) {
  if (typeof value === "string" && value[0] === "@") {
    const name = value.slice(1);
    if (name.startsWith("series")) return theme.series[Number(name.slice(6))];
    return theme[name];
  }
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(v => paint(v, theme));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, theme)]));
  return value;
}
function axis(own, theme) {
  const small = { size: 12, color: theme.soft };
  return { gridcolor: theme.grid, linecolor: theme.line, zeroline: false, automargin: true, tickfont: small, ...own,
    title: own.title ? { ...own.title, font: small, standoff: 10 } : undefined };
}
// A chart's data and layout in the colours of the theme.
function finish(figure) {
  const colors = theme(), own = paint(figure.layout, colors), data = paint(figure.data, colors);
  for (const trace of data) if (trace.colorbar) {
    Object.assign(trace.colorbar, { tickfont: { color: colors.soft, size: 12 } });
    if (trace.colorbar.title) trace.colorbar.title.font = { color: colors.soft, size: 12 };
    if (narrow.matches) Object.assign(trace.colorbar, { orientation: "h", y: -0.35, yanchor: "top", thickness: 9, title: undefined });
  }
  const layout = { paper_bgcolor: colors.card, plot_bgcolor: colors.card, font: { family: "system-ui, sans-serif", color: colors.text },
    margin: { l: narrow.matches ? 40 : 56, r: 14, t: own.showlegend ? 34 : 12, b: 44 }, hovermode: "closest", dragmode: narrow.matches ? false : "zoom",
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { color: colors.soft, size: 12 } },
    hoverlabel: { bgcolor: colors.card, bordercolor: colors.line, font: { color: colors.text, size: 13 }, align: "left" },
    showlegend: false, ...own, xaxis: axis(own.xaxis || {}, colors), yaxis: axis(own.yaxis || {}, colors) };
  return { data, layout };
}

// ---------------------------------------------------------------- saving

function cell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  const inert = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? "'" + text : text;  // a spreadsheet would run it
  return /[",\n\r]/.test(inert) ? '"' + inert.replaceAll('"', '""') + '"' : inert;
}
function plainText(words) {
  const box = document.createElement("textarea");
  box.innerHTML = words;
  return box.value;
}
// Of what is drawn: a line for each point, or for each cell of a map.
function csv(plot) {
  const lines = [["series", "x", "y", "value"]], list = v => Array.from(v || []);
  for (const trace of plot.data) {
    if (trace.hoverinfo === "skip" && trace.mode === "markers") continue;
    const name = plainText(trace.name || "");
    if (trace.type === "heatmap") {
      list(trace.z).forEach((row, i) => list(row).forEach((z, j) => lines.push([name, trace.x ? trace.x[j] : j, trace.y ? trace.y[i] : i, z])));
    } else {
      const y = list(trace.y);
      list(trace.x).forEach((x, i) => lines.push([name, typeof x === "string" ? plainText(x) : x, typeof y[i] === "string" ? plainText(y[i]) : y[i], ""]));
    }
  }
  return lines.map(line => line.map(cell).join(",")).join("\n") + "\n";
}
function save(button) {
  const card = button.closest(".card"), plot = card && card.querySelector(".js-plotly-plot");
  if (!plot) return;
  const name = button.dataset.file || "chart";
  if (button.dataset.save === "png") {
    Plotly.downloadImage(plot, { format: "png", scale: 2, width: plot.clientWidth, height: plot.clientHeight, filename: name });
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv(plot)], { type: "text/csv" }));
  link.download = name + ".csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
document.addEventListener("click", event => {
  const button = event.target.closest && event.target.closest("[data-save]");
  if (button) save(button);
});
return { CONFIG, prefersDark, narrow, finish, csv };
})();
