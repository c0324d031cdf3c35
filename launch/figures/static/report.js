// A report's charts, drawn where they stand.
function draw() {
  for (const figure of FIGURES) {
    const { data, layout } = Shoestring.finish(figure);
    Plotly.react(figure.id, data, layout, Shoestring.CONFIG);
  }
}
Shoestring.prefersDark.addEventListener("change", draw);
Shoestring.narrow.addEventListener("change", draw);
draw();
