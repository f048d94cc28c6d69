// Runs before the first paint, so that a page that was made dark does not flash.
(() => {
  const chosen = localStorage.getItem("bagel-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
