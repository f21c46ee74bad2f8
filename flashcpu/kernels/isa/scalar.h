#define FC_SCALAR
#define FC_ISA scalar
