// Dragging with mouse, pen or finger by pointer events, which HTML's own drag and drop does not do on phones.

const THRESHOLD_PX = 5;

/** options: {ghost() -> element, targets: [element], moving: element, drop(target)}. A click stays a click. */
export function startDrag(event, options) {
  if (event.button !== 0 || !event.isPrimary) return;
  const start = { x: event.clientX, y: event.clientY };
  let ghost = null;
  let target = null;

  function begin() {
    ghost = options.ghost();
    ghost.classList.add("ghost");
    ghost.setAttribute("aria-hidden", "true");
    document.body.append(ghost);
    options.moving.classList.add("moving");
    document.documentElement.classList.add("dragging");
  }

  function move(moved) {
    if (moved.pointerId !== event.pointerId) return;
    const { clientX: x, clientY: y } = moved;
    if (!ghost && Math.hypot(x - start.x, y - start.y) < THRESHOLD_PX) return;
    if (!ghost) begin();
    moved.preventDefault();
    ghost.style.transform = `translate(${x + 8}px, ${y - 18}px)`;
    aim(targetAt(x, y));
  }

  function targetAt(x, y) {
    const under = document.elementFromPoint(x, y)?.closest("[data-slot], [data-gap]");
    return options.targets.includes(under) ? under : null;
  }

  function aim(next) {
    if (next === target) return;
    target?.classList.remove("target");
    next?.classList.add("target");
    target = next;
  }

  function end(ended) {
    if (ended.pointerId !== event.pointerId) return;
    document.removeEventListener("pointermove", move);
    document.removeEventListener("pointerup", end);
    document.removeEventListener("pointercancel", end);
    if (!ghost) return;
    const dropped = ended.type === "pointerup" ? target : null;
    aim(null);
    ghost.remove();
    options.moving.classList.remove("moving");
    document.documentElement.classList.remove("dragging");
    // The click that follows a drag on the same element is not one.
    const swallow = (click) => click.stopPropagation();
    document.addEventListener("click", swallow, { capture: true, once: true });
    setTimeout(() => document.removeEventListener("click", swallow, { capture: true }), 0);
    if (dropped) options.drop(dropped);
  }

  document.addEventListener("pointermove", move, { passive: false });
  document.addEventListener("pointerup", end);
  document.addEventListener("pointercancel", end);
}
