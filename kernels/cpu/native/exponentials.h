// Powers of 2 and of e, sixteen at a time, and what layers make of them.
//
// Knows polynomials; knows nothing of what is weighed with them.
#pragma once

#include "simd.h"

namespace arriero {

// 2**x for x <= 128: exact at 0, 0 from the lowest power down (so at -infinity), 2 units in the
// last place between; NaN stays. Polynomial of Cephes' exp2f (Moshier 1989).
inline F16 exp2(F16 x) {
    x = max(set1(kLowestPower), x);  // of a NaN and a number, max gives its second operand
    const F16 n = round_even(x), r = sub(x, n);
    F16 p = set1(1.535336188319500e-4f);
    p = fma(p, r, set1(1.339887440266574e-3f));
    p = fma(p, r, set1(9.618437357674640e-3f));
    p = fma(p, r, set1(5.550332471162809e-2f));
    p = fma(p, r, set1(2.402264791363012e-1f));
    p = fma(p, r, set1(6.931472028550421e-1f));
    p = fma(p, r, set1(1.0f));
    return scale_by_power(p, n);
}

// e**x, likewise; infinity above 88.4. Argument reduction by ln 2 in two parts and the polynomial
// of Cephes' expf.
inline F16 exp(F16 x) {
    // min and max hand on their second operand when one is NaN.
    const F16 y = max(set1(kLowestPower * 0.693147f), min(set1(89.0f), x));
    const F16 n = round_even(mul(y, set1(1.44269504088896341f)));
    F16 r = fma(n, set1(-0.693359375f), y);
    r = fma(n, set1(2.12194440e-4f), r);
    F16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return scale_by_power(p, n);
}

inline F16 silu(F16 x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

}  // namespace arriero
