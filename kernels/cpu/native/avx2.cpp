#include "api.inc"
