// A sign-in link carries name and token behind "#", which browsers never send; they are taken into the form and removed.
const given = new URLSearchParams(location.hash.slice(1));
const form = document.getElementById("sign-in");
if (given.get("name") && given.get("token")) {
  form.elements.name.value = given.get("name");
  form.elements.token.value = given.get("token");
  history.replaceState(null, "", location.pathname + location.search);
  form.requestSubmit();
}
