/* fastrms: fused in-place RMSProp, AdaGrad, Adam and RProp updates.  See fastrms_decl.h. */
#ifndef FASTRMS_H
#define FASTRMS_H
#include <stddef.h>                                       /* NULL */
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#include "fastrms_decl.h"
#ifdef __cplusplus
}
#endif
#endif
