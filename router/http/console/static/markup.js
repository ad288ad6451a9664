// Preact's functions and the template tag `html`, for every component.

import { Fragment, h, render } from "preact";
import htm from "htm";

export { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
export { Fragment, render };
export const html = htm.bind(h);
