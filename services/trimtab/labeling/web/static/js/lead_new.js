// The form of a new campaign: only what the chosen kind needs, and a short name made of the title.
const form = document.getElementById("new-campaign");
const { title, name } = form.elements;
let named = name.value !== "";

name.addEventListener("input", () => (named = name.value !== ""));
title.addEventListener("input", () => {
  if (named) return;
  name.value = title.value.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 64);
});

function show() {
  const kind = form.elements.kind.value;
  for (const group of form.querySelectorAll(".only-ranking")) group.hidden = kind !== "ranking";
  for (const group of form.querySelectorAll(".not-demonstration")) group.hidden = kind === "demonstration";
  for (const samples of form.querySelectorAll("[name^=samples_]")) {
    samples.closest("label").hidden = kind !== "ranking";
    if (kind === "comparison") samples.value = "1";
  }
}

form.addEventListener("change", show);
show();
