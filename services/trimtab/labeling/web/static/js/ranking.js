// A ranking in the making: which answer is on which rank. No page here; tests run it without a browser.
//
// There are as many ranks as answers. Several answers on one rank are tied; a rank may be empty meanwhile (the server
// closes gaps). Every change can be undone.

export class Ranking {
  /** letters: ["A", "B", …]; ranks: {A: 2, …}, without the letters that have none. */
  constructor(letters, ranks = {}) {
    this.letters = letters;
    this.ranks = { ...ranks };
    this.history = [];
  }

  rankOf(letter) {
    return this.ranks[letter] ?? null;
  }

  /** The letters on a rank, in the order shown; rank null: those without one. */
  on(rank) {
    return this.letters.filter((letter) => this.rankOf(letter) === rank);
  }

  tiedWith(letter) {
    const rank = this.rankOf(letter);
    return rank === null ? [] : this.on(rank).filter((other) => other !== letter);
  }

  get missing() {
    return this.on(null).length;
  }

  /** Put a letter on a rank, tied with whoever is there; null takes its rank away. */
  place(letter, rank) {
    if (this.rankOf(letter) === rank) return false;
    return this.#change(() => this.#set(letter, rank));
  }

  /** Put a letter on a rank of its own before those on `rank` (rank K + 1: behind all). */
  insertBefore(letter, rank) {
    return this.#change(() => {
      this.#set(letter, null);
      this.#set(letter, this.#open(rank));
    });
  }

  /** One place better (-1) or worse (+1): out of a tie first, then past the next rank that holds somebody. */
  move(letter, step) {
    const rank = this.rankOf(letter);
    if (rank === null) {
      const held = this.#held();
      const end = held.length ? (step < 0 ? held[0] : held[held.length - 1] + 1) : 1;
      return this.insertBefore(letter, end);
    }
    if (this.tiedWith(letter).length) return this.insertBefore(letter, step < 0 ? rank : rank + 1);
    const next = this.#next(rank, step);
    return next === null ? false : this.insertBefore(letter, step < 0 ? next : next + 1);
  }

  /** Tie a letter with the next better rank, or end its tie: it then stands right behind those it was tied with. */
  toggleTie(letter) {
    const rank = this.rankOf(letter);
    if (rank === null) return false;
    if (this.tiedWith(letter).length) return this.insertBefore(letter, rank + 1);
    const better = this.#next(rank, -1) ?? this.#next(rank, 1);
    return better === null ? false : this.place(letter, better);
  }

  /** Something else that undo should bring back, e.g. a rating: `restore` puts it back. */
  remember(restore) {
    this.history.push({ ranks: this.ranks, restore });
  }

  undo() {
    const last = this.history.pop();
    if (!last) return false;
    this.ranks = last.ranks;
    last.restore?.();
    return true;
  }

  #change(apply) {
    const before = this.ranks;
    this.ranks = { ...before };
    apply();
    if (this.letters.every((letter) => this.ranks[letter] === before[letter])) {
      this.ranks = before;
      return false;
    }
    this.history.push({ ranks: before });
    return true;
  }

  #set(letter, rank) {
    if (rank === null) delete this.ranks[letter];
    else this.ranks[letter] = rank;
  }

  /** Make room for a rank of its own before `rank`; there is always an empty one, since the moved letter left its own. */
  #open(rank) {
    const empty = (r) => r >= 1 && r <= this.letters.length && !this.on(r).length;
    if (empty(rank - 1)) return rank - 1;
    let up = rank;
    while (up <= this.letters.length && !empty(up)) up += 1;
    if (up <= this.letters.length) {
      this.#shift(rank, up - 1, +1);
      return rank;
    }
    let down = rank - 1;
    while (!empty(down)) down -= 1;
    this.#shift(down + 1, rank - 1, -1);
    return rank - 1;
  }

  #shift(first, last, step) {
    for (const letter of this.letters) {
      const rank = this.rankOf(letter);
      if (rank !== null && rank >= first && rank <= last) this.ranks[letter] = rank + step;
    }
  }

  #held() {
    return [...new Set(Object.values(this.ranks))].sort((a, b) => a - b);
  }

  #next(rank, step) {
    const held = this.#held();
    return held[held.indexOf(rank) + step] ?? null;
  }
}
