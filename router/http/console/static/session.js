// Values that live as long as the tab. API key and admin token are kept here and nowhere else.

const PREFIX = "arriero.";

/** The stored value of a name; `fallback` where none is stored or the value cannot be read. */
export function readValue(name, fallback) {
  try {
    const text = sessionStorage.getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** Store a value; false where the browser has no room for it. */
export function writeValue(name, value) {
  try {
    sessionStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** Remove the values of some names. */
export function removeValues(...names) {
  for (const name of names) sessionStorage.removeItem(PREFIX + name);
}
