// The sign-in link of a new token as a whole address, to be copied.
const link = document.getElementById("link");
if (link) link.textContent = link.href;
