#define EARLIER 1
