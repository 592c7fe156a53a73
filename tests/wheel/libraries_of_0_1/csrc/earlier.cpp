#include "earlier.h"
int earlier() { return EARLIER; }
