// Small pieces of the page; text always goes in as text.

export function element(name, css, words = "") {
  const made = document.createElement(name);
  if (css) made.className = css;
  made.textContent = words;
  return made;
}

export function button(words, help, onClick) {
  const made = element("button", "", words);
  made.type = "button";
  made.title = help;
  made.addEventListener("click", onClick);
  return made;
}

// Says what went wrong in the view's own place for it; "" takes it back.
export function complain(root, message) {
  const place = root.querySelector(".at-complaint");
  place.textContent = message;
  place.hidden = !message;
}
