// Numbers, shares and times as people read them.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const TENTHS = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const whole = (value) => WHOLE.format(Number(value));
export const tenths = (value) => TENTHS.format(value);
export const compact = (value) => COMPACT.format(Number(value));

/** A rate: with tenths below 100. */
export const rounded = (value) => (value < 100 ? tenths(value) : whole(value));

/** A part of a whole in percent; "–" where there is no whole. */
export const share = (part, total) =>
  Number(total) ? `${Math.round((100 * Number(part)) / Number(total))} %` : "–";

/** Seconds since 1970 as the time of day. */
export const timeOfDay = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");

/** Seconds since 1970 for a `datetime` attribute. */
export const isoTime = (at) => new Date(at * 1000).toISOString();
