// State outside of components: a value, its changes, and the components that follow the value.

import { useEffect, useState } from "./markup.js";

/** A store: `get`, `set` with changed fields, `follow` for a listener. */
export function makeStore(initial) {
  let state = initial;
  const listeners = new Set();
  return {
    get: () => state,
    set(changes) {
      state = { ...state, ...(typeof changes === "function" ? changes(state) : changes) };
      for (const listener of [...listeners]) listener(state);
    },
    follow(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/** The state of a store; the component is drawn again after each change. */
export function useStore(store) {
  const [state, setState] = useState(store.get());
  useEffect(() => {
    setState(store.get()); // a change between drawing and following
    return store.follow(setState);
  }, [store]);
  return state;
}
